"""Conversations with an environment: ids, masks, rewards, and credit across turns."""

import numpy as np
import pytest
import torch
from test_grpo_run import ROWS
from test_ppo_run import CONFIG, SETTINGS  # noqa: F401
from test_trainers import Noting
from tiny_policy import high_ids, tiny_tokenizer, untimed

from taurl.llm import PPO
from taurl.llm.data.chat import following_ids
from taurl.llm.episodes import STEPS_BETWEEN_TURNS, Stage
from taurl.llm.generation import Completion, Sampling
from taurl.runtime.errors import InputError


class Echo:
    """Three turns. Each earns at once, the more letters a the more, and the last one twice that."""

    def __init__(self, seed):
        self.seed, self.turn, self.said = seed, 0, []

    def reset(self):
        return [{"role": "system", "content": "echo"}, {"role": "user", "content": f"say a{self.seed % 10}"}]

    def step(self, completion):
        self.turn += 1
        self.said.append(completion)
        earned = 0.1 + completion.count("a") / max(1, len(completion))
        over = self.turn == 3
        return ([] if over else [{"role": "user", "content": "and?"}]), earned * (1 + over), over


class Scripted:
    """A sampler that says what it is told, and notes what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked, self.keys = list(answers), [], []

    def generate(self, prompts, count, sampling, *, key=(0, 0), **keywords):
        self.asked.append([list(prompt) for prompt in prompts])
        self.keys.append(key)
        return [[self.answers.pop(0)] for _ in prompts]


def stage(make=Echo, **changes):
    tokenizer = tiny_tokenizer()

    def encode(messages):
        return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))

    options = {"max_turns": 8, "context": None, "chat_template_kwargs": {}} | changes
    return Stage(make, encode, tokenizer, **options)


def said(text, *, ended=True):
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] + [1] * ended
    return Completion(ids, [-0.5] * len(ids), "stop" if ended else "length")


def test_each_turn_appends_to_the_ids_that_are_there():
    """The ids are those of the whole conversation, whether a turn ended by itself or was cut off."""
    sampler = Scripted([said("aa"), said("b", ended=False), said("ca")])
    (episode,) = stage().play([7], sampler, Sampling(4), key=(3, 5))
    text = tiny_tokenizer().decode(episode.prompt + episode.tokens)
    expected = "<system>echo<end><user>say a7<end><assistant>aa<end><user>and?<end><assistant>b<end><user>and?<end>"
    assert text == f"{expected}<assistant>ca<end>"
    assert sampler.asked[1] == [episode.prompt + episode.tokens[: len(sampler.asked[1][0]) - len(episode.prompt)]]
    assert sampler.asked[2][0][: len(sampler.asked[1][0])] == sampler.asked[1][0]
    own = [token for token, chosen in zip(episode.tokens, episode.chosen, strict=True) if chosen]
    assert own == said("aa").tokens + said("b", ended=False).tokens + said("ca").tokens
    earned = [r for r, end in zip(episode.rewards, episode.turn_ends(), strict=True) if end]
    assert earned == pytest.approx([1.1, 0.1, 1.2])
    assert sum(episode.rewards) == pytest.approx(2.4)
    assert [p for p, c in zip(episode.logprobs, episode.chosen, strict=True) if not c] == [0.0] * 15
    assert (episode.over, episode.turns, episode.completion.finish, episode.completion.length) == (True, 3, "stop", 7)
    assert episode.cut_turns == 1
    assert len(set(sampler.keys)) == 3
    assert episode.environment.said == ["aa", "b", "ca"]


def test_an_episode_that_runs_out_of_turns_or_context_is_truncated():
    (episode,) = stage(max_turns=2).play([7], Scripted([said("aa"), said("b")]), Sampling(4))
    assert (episode.over, episode.turns, episode.completion.finish) == (False, 2, "length")
    text = tiny_tokenizer().decode(episode.prompt + episode.tokens)
    assert text.endswith("b<end><user>and?<end><assistant>")  # the state that its value is taken of
    (cut,) = stage(max_turns=1, context=len(episode.prompt) + 6).play([7], Scripted([said("aa")]), Sampling(3))
    assert len(cut.tokens) == 6
    (short,) = stage(context=len(episode.prompt) + 13).play([7], Scripted([said("aa")]), Sampling(4))
    assert (short.turns, short.completion.finish) == (1, "length")


def test_a_template_that_rewrites_earlier_turns_does_not_touch_what_was_sampled():
    """This one drops what stands before </think> in all turns but the last."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('+')[-1] }}{% else %}{{ m.content }}"
        "{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "user", "content": "more"}]
    assert tokenizer.decode(following_ids(messages, tokenizer, 1)) == "<user>more<end><assistant>"
    assert tokenizer.decode(following_ids(messages, tokenizer, 9)) == "<end><user>more<end><assistant>"
    answered = tokenizer("hm+ok")["input_ids"] + [1]
    ids = [3, *answered, *following_ids(messages, tokenizer, answered[-1])]
    assert tokenizer.decode(ids) == "<user>hm+ok<end><user>more<end><assistant>"


def failing(where):
    class Environment(Echo):
        def reset(self):
            return 1 / 0 if where == "reset" else "hello" if where == "text" else super().reset()

        def step(self, completion):
            match where:
                case "step":
                    raise ValueError("no such move")
                case "five":
                    return [], 0.0, True, False, {}
                case "reward":
                    return [], None, True
                case "words":
                    return "no", 0.0, False
                case "silence":
                    return [], 0.0, False
            return super().step(completion)

    return Environment


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("reset", "environment with seed 7: reset raised ZeroDivisionError"),
        ("text", "environment with seed 7: reset: it said 'hello'; expected a list of messages"),
        ("words", "turn 1: step: the episode is not over, and it said 'no'; expected a list of messages"),
        ("step", "environment with seed 7, turn 1: step raised ValueError: no such move"),
        ("reward", "turn 1: step gave the reward None, expected a finite number"),
        ("step", rf"no such move \({__file__}:\d+\)"),
        ("five", "turn 1: step gave 5 values, expected three: the messages that follow, a reward, and whether"),
        ("silence", "turn 1: step: the episode is not over, and what it said is an empty list of messages"),
    ],
)
def test_a_failing_environment_is_named_with_seed_and_turn(where, message):
    with pytest.raises(InputError, match=message):
        stage(failing(where)).play([7], Scripted([said("a")] * 3), Sampling(4))


def test_a_beginning_that_the_model_cannot_see_whole_is_named_with_its_seed():
    count = len(stage().encode(Echo(7).reset()))
    with pytest.raises(InputError, match=f"environment with seed 7: reset gave {count} tokens; with max_tokens 4"):
        stage(context=count + 3).play([7], Scripted([said("a")]), Sampling(4))


def test_a_template_that_refuses_is_named_with_its_seed():
    played = stage()

    def refuse(messages):
        raise InputError("the chat template refuses this")

    played.encode = refuse
    with pytest.raises(InputError, match="environment with seed 7: reset: the chat template refuses"):
        played.play([7], Scripted([]), Sampling(4))


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor([2.0])])
def test_numbers_of_numpy_and_torch_are_rewards(number):
    class Environment(Echo):
        def step(self, completion):
            return [], number, True

    (episode,) = stage(Environment).play([7], Scripted([said("a")]), Sampling(4))
    assert sum(episode.rewards) == float(number)


@pytest.mark.parametrize("found", ["1.0", float("nan"), torch.ones(2), 10**400], ids=["text", "nan", "two", "huge"])
def test_what_is_no_finite_number_is_no_reward(found):
    class Environment(Echo):
        def step(self, completion):
            return [], found, True

    with pytest.raises(InputError, match="expected a finite number"):
        stage(Environment).play([7], Scripted([said("a")]), Sampling(4))


def test_credit_flows_across_turns_and_nothing_is_learned_of_the_environments_words(config, folder):
    settings = config(
        discount=0.9,
        trace_decay=1.0,
        whiten="none",
        critic="none",
        truncated="penalty",
        kl_coefficient=0,
    )
    trainer = PPO(str(folder), config=settings, environment=Echo)
    step = next(iter(trainer.run.steps()))
    collected = trainer._collect(step)
    estimates, _ = trainer._estimate(collected, 1)
    assert collected.episodes["episodes/mean_turns"] == 3
    assert [row["prompt"] for row in collected.rows[::2]] == [row["prompt"] for row in collected.rows[1::2]]
    for row, completion in enumerate(collected.rollout.completions):
        chosen = torch.tensor(completion.chosen)
        assert torch.equal(collected.rollout.mask[row, : len(chosen)], chosen)
        earned = collected.rewards[row, : len(chosen)][chosen]
        expected, after = [], 0.0
        for reward in reversed(earned.tolist()):
            after = reward + 0.9 * after
            expected.insert(0, after)
        found = estimates.advantages[row, : len(chosen)]
        assert found[chosen].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert not found[~chosen].any()
    assert float(estimates.advantages[:, 0].abs().sum()) > 0


def test_a_truncated_episode_bootstraps_behind_the_environments_answer(config, folder):
    """The value that an episode of one turn fewer ends with is the one before the next turn's first token."""
    found = {}
    for turns in (2, 1):
        settings = config(max_turns=turns, truncated="bootstrap", missing_eos_penalty=1.0, out=None, kl_coefficient=0)
        trainer = PPO(str(folder), config=settings, environment=Echo)
        torch.manual_seed(1)
        trainer.critic.head.weight.data.normal_()
        rollout = trainer._collect(next(iter(trainer.run.steps()))).rollout
        found[turns] = rollout, *trainer._values(rollout, range(8))
    (longer, values, _), (shorter, _, ends) = found[2], found[1]
    for row, completion in enumerate(shorter.completions):
        length = len(completion.tokens)
        assert longer.completions[row].tokens[:length] == completion.tokens
        assert longer.mask[row, length]
        torch.testing.assert_close(ends[row], values[row, length])


def test_what_a_completion_or_an_episode_earns_by_default_that_was_cut_off(config, folder):
    """A critic that starts at 0 would make being cut off better than a score below 0; an episode keeps its rewards."""
    common = {"truncated": None, "missing_eos_penalty": 1.0, "out": None, "eval_rows": 0}
    assert PPO(str(folder), ROWS, high_ids, config(**common)).config.truncated == "penalty"
    assert PPO(str(folder), config=config(**common), environment=Echo).config.truncated == "bootstrap"
    with pytest.raises(InputError, match=r"missing_eos_penalty is 0\.5, but truncated is bootstrap here, not penalty"):
        PPO(str(folder), config=config(**common | {"missing_eos_penalty": 0.5}), environment=Echo)
    without = config(**common, critic="none", trace_decay=1.0)
    assert PPO(str(folder), config=without, environment=Echo).config.truncated == "penalty"
    assert PPO(str(folder), ROWS, high_ids, config(**common | {"truncated": "mask"})).config.truncated == "mask"


def test_rewards_of_turns_are_divided_by_their_deviation_and_keep_their_mean(config, folder):
    settings = config(normalize_rewards=True, kl_coefficient=0, eval_rows=0)
    trainer = PPO(str(folder), config=settings, environment=Echo)
    collected = trainer._collect(next(iter(trainer.run.steps())))
    estimates, _ = trainer._estimate(collected, 1)
    turns = collected.rewards[collected.earned]
    assert len(turns) == 24
    found = estimates.rewards[collected.earned].double()
    torch.testing.assert_close(found, turns / turns.std(correction=0), rtol=1e-5, atol=1e-5)


def test_it_learns_from_an_environment_and_resumes_exactly(config, folder, tmp_path):
    changes = {"steps": 12, "prompts_per_step": 16, "group_size": 1, "learning_rate": 2e-2, "kl_coefficient": 0.01}
    changes |= {"max_tokens": 4, "save_every": 5, "eval_rows": 4}
    whole = PPO(str(folder), config=config(**changes), environment=Echo).train().run
    records = whole.records()
    assert records[-1]["reward"] > records[1]["reward"] + 0.5
    assert records[-1]["eval/reward"] > records[0]["eval/reward"]
    assert records[-1]["episodes/mean_turns"] == records[-1]["eval/episodes/mean_turns"] == 3
    assert 0 < records[1]["episodes/cut_turns"] <= 1
    first = PPO(str(folder), config=config(**changes, out=tmp_path / "cut"), environment=Echo)
    steps = first.steps()
    for _ in range(7):
        next(steps)
    steps.close()
    resumed = PPO.resume(tmp_path / "cut", environment=Echo).train().run
    assert untimed(resumed.records()) == untimed(records)
    sample = next(s for s in resumed.samples() if s["kind"] == "train")
    assert sample["prompt"].startswith("system: echo")
    assert sample["rewards"].keys() == {"environment"}


def test_every_step_has_episodes_and_draws_of_its_own_and_every_evaluation_the_same(config, folder):
    seeds = []

    class Seeded(Echo):
        def __init__(self, seed):
            super().__init__(seed)
            seeds.append(seed)

    changes = {"steps": 4, "eval_every": 2, "prompts_per_step": 2, "seed": 7, "temperature": 0.8, "stop": ("a", "b.")}
    trainer = PPO(str(folder), config=config(**changes), environment=Seeded)
    trainer.generator = noting = Noting(trainer.generator)
    trainer.train()
    # Two to evaluate on, then two steps of two seeds with two episodes each, and so on.
    evaluations, steps = [seeds[:2], seeds[10:12], seeds[20:]], [*seeds[2:10], *seeds[12:20]]
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert steps[::2] == steps[1::2]
    assert len({*steps, *evaluations[0]}) == 8 + 2
    greedy, drawn = (Sampling(6, temperature=temperature, stop=("a", "b.")) for temperature in (0, 0.8))
    asked = [(sampling, key) for _, _, sampling, key in noting.asked]
    assert {sampling for sampling, _ in asked} == {greedy, drawn}
    keys = [key for sampling, key in asked if sampling == drawn]
    assert keys == [(7, step + turn * STEPS_BETWEEN_TURNS) for step in (1, 2, 3, 4) for turn in range(3)]


def test_an_environment_by_name(config, folder, tmp_path):
    file = tmp_path / "game.py"
    file.write_text(
        "class Game:\n"
        "    def __init__(self, seed): self.seed = seed\n"
        "    def reset(self): return [{'role': 'user', 'content': str(self.seed % 7)}]\n"
        "    def step(self, completion): return [], float(len(completion)), True\n"
    )
    run = PPO(str(folder), config=config(environment=f"{file}:Game", steps=1)).train().run
    assert "eval/rewards/environment/mean" in run.records()[-1]
    with pytest.raises(InputError, match=r"no environment 'Gane' in .*game.py.*did you mean Game"):
        PPO(str(folder), config=config(environment=f"{file}:Gane", out=None))
    with pytest.raises(
        InputError, match=r"environment 'game' not understood: expected package.module:name or path/to/file.py:name"
    ):
        PPO(str(folder), config=config(environment="game", out=None))
