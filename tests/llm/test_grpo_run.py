"""GRPO from Python: what is trained, what is kept, what is refused."""

import asyncio
import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_policy import high_ids, letter_a, tiny_model, tiny_tokenizer, untimed

from taurl.llm import GRPO, GRPOConfig
from taurl.llm.algorithms import setup
from taurl.llm.algorithms.figures import rollout_figures
from taurl.llm.data.tasks import PromptReader, train_and_held_out
from taurl.llm.evaluation import reward_metrics
from taurl.llm.generation import Completion
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.llm.rewards import Scores
from taurl.llm.scoring.rollouts import Rollout
from taurl.runtime.errors import InputError, RunError

ROWS = [{"prompt": f"{i}+{i % 3}?", "answer": str(i + i % 3)} for i in range(12)]
CONFIG = GRPOConfig
SETTINGS = {
    "steps": 3,
    "prompts_per_step": 2,
    "group_size": 4,
    "max_tokens": 6,
    "eval_rows": 2,
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- use from Python


def test_ten_lines_with_a_model_object_a_dataset_and_plain_functions(tmp_path):
    from taurl.llm import GRPO, GRPOConfig

    def brevity(completions, **kwargs):  # as for TRL
        return [-float(len(completion[0]["content"])) for completion in completions]

    async def judge(prompts, completions, answer, trainer_state, log_metric, log_extra):
        await asyncio.sleep(0)
        log_metric("judge/steps_done", trainer_state.global_step)
        log_extra("seen", [f"{p[-1]['content']} {a}" for p, a in zip(prompts, answer, strict=True)])
        return [1.0 if c[0]["content"].startswith(a) else 0.0 for c, a in zip(completions, answer, strict=True)]

    rows = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
    )
    records = []
    config = GRPOConfig(
        out=tmp_path / "run", steps=2, prompts_per_step=2, group_size=4, max_tokens=6, eval_rows=3, threads=1
    )
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = GRPO(model, rows, [brevity, judge], config, tokenizer=tiny_tokenizer(), callbacks=[records.append])
    assert trainer.train() is trainer

    assert trainer.policy.model is model  # trained in place
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [record["step"] for record in records] == [0, 1, 2]
    assert [record["judge/steps_done"] for record in records[1:]] == [0, 1]
    for record in records[1:]:
        assert record["reward"] == pytest.approx(record["rewards/brevity/mean"] + record["rewards/judge/mean"])
    assert {"eval/reward", "eval/rewards/judge/mean"} <= records[0].keys() & records[2].keys()
    assert not any(key.startswith("eval/") for key in records[1])
    sample = next(s for s in trainer.run.samples() if s["kind"] == "train")
    assert sample["seen"] == f"{sample['prompt']} {sample['answer']}"
    for name, tensor in load_file(tmp_path / "run" / "final" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert load_tokenizer(tmp_path / "run" / "final").chat_template


def test_what_reward_functions_are_given_is_theirs(config, folder):
    """As in TRL, where rows are read anew: a change in it reaches neither the data nor what is trained."""
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1?"}], "answer": str(i + 1), "facts": [i]} for i in range(12)]
    seen = []

    def careless(prompts, completion_ids, facts, **kwargs):
        seen.append(max(len(prompt) for prompt in prompts) + max(map(len, facts)))
        for prompt, ids, known in zip(prompts, completion_ids, facts, strict=True):
            prompt.append({"role": "assistant", "content": "?"})
            ids.clear()
            known.append("more")
        return [float(place) for place in range(len(prompts))]

    def careful(prompts, **kwargs):
        return [float(place) for place in range(len(prompts))]

    place = config().out.parent
    runs = [GRPO(str(folder), rows, f, config(out=place / f.__name__)).train().run for f in (careless, careful)]
    assert set(seen) == {2}
    one, other = (untimed(run.records()) for run in runs)
    assert [record["reward"] for record in one if "reward" in record] == [r["reward"] for r in other if "reward" in r]
    assert [record.get("grad_norm") for record in one] == [record.get("grad_norm") for record in other]


def test_evaluating_writes_nothing_and_needs_no_run(config, folder):
    trainer = GRPO(str(folder), ROWS, letter_a, config(steps=1))
    before = trainer.evaluate()
    assert not trainer.run.directory.exists()
    trainer.train()
    written = lines(trainer.run.directory / "samples.jsonl")
    first, last = lines(trainer.run.directory / "metrics.jsonl")
    assert untimed([before])[0].items() <= first.items()
    after = trainer.evaluate()
    assert after["eval/reward"] == last["eval/reward"]
    with pytest.raises(InputError, match="no held-out rows to evaluate on: give eval_rows or eval_dataset"):
        GRPO(str(folder), ROWS, letter_a, config(eval_rows=0, out=None)).evaluate()
    assert lines(trainer.run.directory / "samples.jsonl") == written


def test_a_step_trains_on_prompts_that_are_not_held_out_and_keeps_samples_in_whole_rows(config, folder):
    trainer = GRPO(str(folder), ROWS, letter_a, config(steps=6, samples_per_step=3)).train()
    samples = trainer.run.samples()
    held_out = {s["prompt"] for s in samples if s["kind"] == "evaluation"}
    trained = [s for s in samples if s["kind"] == "train"]
    assert len(held_out) == 2
    assert held_out | {trainer.prompts.rows[s["row"]]["prompt"] for s in trained} <= {row["prompt"] for row in ROWS}
    assert held_out.isdisjoint(row["prompt"] for row in trainer.prompts.rows)
    for prompts in (trainer.prompts, trainer.held_out):
        for row, ids in zip(prompts.rows, prompts.ids, strict=True):
            assert tiny_tokenizer().decode(ids) == f"<user>{row['prompt']}<end><assistant>"
    assert [s["step"] for s in trained] == [step for step in range(1, 7) for _ in range(3)]
    for sample in trained:
        assert sample["prompt"] == trainer.prompts.rows[sample["row"]]["prompt"]
        assert sample["reward"] == sample["rewards"]["letter_a"] == letter_a([sample["completion"]])[0]


# --- learning


def test_it_learns_a_letter(config, folder):
    settings = config(steps=25, prompts_per_step=4, group_size=8, learning_rate=1e-2, eval_rows=4)
    records = GRPO(str(folder), ROWS, letter_a, settings).train().run.records()
    rewards = [record["reward"] for record in records if "reward" in record]
    assert sum(rewards[:3]) / 3 < 0.1
    assert sum(rewards[-3:]) / 3 > 0.6
    assert records[0]["eval/reward"] < 0.2 < 0.8 < records[-1]["eval/reward"]


@pytest.mark.slow
def test_the_entropy_bonus_and_the_kl_term_hold_the_policy_back(config, folder, tmp_path):
    def final(**changes):
        settings = config(steps=12, prompts_per_step=4, learning_rate=1e-2, eval_rows=0, **changes)
        return GRPO(str(folder), ROWS, letter_a, settings).train().run.records()[-1]

    free = final(out=tmp_path / "free")
    assert final(out=tmp_path / "bonus", entropy_coefficient=1.0)["entropy"] > free["entropy"] + 0.3
    near, far = (final(out=tmp_path / f"kl{c}", kl_coefficient=c)["kl"] for c in (3.0, 1e-6))
    assert 0 < near < far / 3


def test_figures_of_a_step_by_hand():
    """Two prompts with three completions each, of which one was not judged; of two reward functions."""
    lengths, finishes = [2, 1, 3, 1, 1, 4], ["stop", "length", "stop", "stop", "stop", "length"]
    completions = [Completion([9] * length, [0.0] * length, end) for length, end in zip(lengths, finishes, strict=True)]
    rollout = Rollout.of([[1], [2, 3]], [completions[:3], completions[3:]], torch.device("cpu"))
    rewards = torch.tensor([[1.0, 0.0, math.nan], [2.0, 2.0, 2.0]], dtype=torch.float64)
    assert rollout_figures(rollout, rewards, {"time/sample": 2.0, "time/update": 1.0}) == pytest.approx(
        {
            "reward_std": math.sqrt(0.5) / 2,  # n − 1 below, and the group without a spread counts
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 2,
            "completions/max_length": 4,
            "completions/clipped_ratio": 1 / 3,
            "sampling/tokens_per_second": 6,
            "tokens_per_second": 4,
        }
    )
    values = np.array([[1.0, 5.0], [0.0, math.nan], [math.nan, math.nan], [2.0, 1.0]])
    scores = Scores(values, np.nansum(values, 1), {"a": 0.1, "b": 0.2}, {"a/mine": 3.0}, {})
    assert reward_metrics(["a", "b"], scores) == pytest.approx(
        {
            "a/mine": 3,
            "reward": 9 / 4,
            "rewards/a/mean": 1,
            "rewards/a/std": math.sqrt(2 / 3),
            "rewards/a/seconds": 0.1,
            "rewards/b/mean": 3,
            "rewards/b/std": 2,
            "rewards/b/seconds": 0.2,
        }
    )


# --- the reference and LoRA


def test_the_reference_is_the_starting_weights_also_after_a_resume(config, folder):
    settings = config(kl_coefficient=0.1, save_every=1)
    trainer = GRPO(str(folder), ROWS, high_ids, settings).train()
    records = trainer.run.records()
    assert records[1]["kl"] == 0  # before the first update
    assert all(record["kl"] > 1e-4 for record in records[2:])
    longer = trainer.config.model_copy(update={"steps": 4})
    resumed = GRPO.resume(trainer.run.directory, longer, dataset=ROWS, rewards=high_ids)
    pairs = zip(trainer.policy.model.parameters(), resumed.policy.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)  # before it goes on: what is evaluated and exported
    resumed.train()
    start = load_file(folder / "model.safetensors")
    with resumed.policy.reference() as reference:
        for name, tensor in start.items():
            assert torch.equal(reference.state_dict()[name], tensor)
    assert resumed.run.records()[-1]["kl"] > 1e-4


def test_lora_trains_the_adapter_alone_and_its_reference_is_the_base(config, folder):
    settings = config(lora_rank=2, kl_coefficient=0.1, learning_rate=3e-2, lora_targets=("q_proj", "v_proj"))
    trainer = GRPO(str(folder), ROWS, high_ids, settings).train()
    start = load_file(folder / "model.safetensors")
    state = trainer.policy.model.get_base_model().state_dict()
    base = {name.replace(".base_layer", ""): t for name, t in state.items() if "lora_" not in name}
    for name, tensor in start.items():
        assert torch.equal(base[name], tensor)
    stored = load_file(trainer.run.directory / "checkpoints" / "step-000003" / "optimizer.safetensors")
    trained = {name.partition("/")[2] for name in stored if name.startswith("master/")}
    assert trained
    assert all("lora_" in name for name in trained)
    records = trainer.run.records()
    assert records[1]["kl"] == 0 < records[2]["kl"]

    ids = torch.tensor([[3, 32, 43, 33, 1, 4]])
    plain = load_model(str(folder), dtype=torch.float32)
    with torch.no_grad():
        with trainer.policy.reference() as reference:
            torch.testing.assert_close(reference(ids).logits, plain(ids).logits, rtol=0, atol=0)
        adapted = trainer.policy.model(ids).logits
        assert not torch.allclose(adapted, plain(ids).logits)
        loaded = load_model(str(trainer.run.directory / "final"), dtype=torch.float32)
        assert isinstance(loaded, PeftModel)
        torch.testing.assert_close(loaded(ids).logits, adapted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_resumes_exactly(config, folder, tmp_path, precision):
    settings = config(lora_rank=2, steps=4, save_every=2, learning_rate=3e-2, precision=precision)
    whole = GRPO(str(folder), ROWS, letter_a, settings).train().run
    first = GRPO(str(folder), ROWS, letter_a, settings.model_copy(update={"out": tmp_path / "cut"}))
    steps = first.steps()
    for _ in range(3):
        next(steps)
    steps.close()
    seen = []
    resumed = GRPO.resume(tmp_path / "cut", rewards=letter_a, dataset=ROWS, callbacks=[seen.append]).train().run
    assert [record["step"] for record in seen] == [3, 4]
    assert untimed(resumed.records()) == untimed(whole.records())
    final = "final/adapter_model.safetensors"
    assert (resumed.directory / final).read_bytes() == (whole.directory / final).read_bytes()


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_nothing_but_rounding(config, folder, tmp_path, rank):
    def run(on):
        settings = config(out=tmp_path / f"run{on}", gradient_checkpointing=on, lora_rank=rank, eval_rows=2)
        return untimed(GRPO(str(folder), ROWS, letter_a, settings).train().run.records())

    for without, with_it in zip(run(False), run(True), strict=True):
        assert without.keys() == with_it.keys()
        for name, value in without.items():
            assert with_it[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_slow_generator_draws_the_same(config, folder, tmp_path):
    def rewards(generator):
        settings = config(out=tmp_path / generator, generator=generator, steps=2)
        return [
            r.get("reward", r.get("eval/reward"))
            for r in GRPO(str(folder), ROWS, letter_a, settings).train().run.records()
        ]

    assert rewards("slots") == rewards("transformers")


# --- resuming


def test_what_came_from_python_is_asked_for_again(config, folder):
    def reward(completions, **kwargs):
        return letter_a(completions)

    run = GRPO(tiny_model(), ROWS, reward, config(), tokenizer=tiny_tokenizer()).train().run
    changed = run.config.model_copy(update={"steps": 5})
    given = {"model": tiny_model(), "dataset": ROWS, "rewards": [reward], "tokenizer": tiny_tokenizer()}
    for name in given:
        others = {key: value for key, value in given.items() if key != name}
        with pytest.raises(InputError, match=f"its {name} came from Python as an object"):
            GRPO.resume(run.directory, changed, **others)
    resumed = GRPO.resume(run.directory, changed, **given).train().run
    assert [r["step"] for r in resumed.records()] == [0, 1, 2, 3, 4, 5]
    assert resumed.records()[:4] == run.records()[:4]


def test_a_resumed_run_keeps_the_precision_that_was_chosen(config, folder, monkeypatch):
    """Where it was measured: another measurement might have another winner."""
    chosen = torch.bfloat16
    monkeypatch.setattr(setup, "choose_precision", lambda name, device: chosen)
    trainer = GRPO(str(folder), ROWS, letter_a, config(precision="auto")).train()
    chosen = torch.float32
    longer = trainer.config.model_copy(update={"steps": 4})
    resumed = GRPO.resume(trainer.run.directory, longer, dataset=ROWS, rewards=letter_a)
    assert trainer.policy.model.dtype == resumed.policy.model.dtype == torch.bfloat16


def test_a_run_that_began_on_a_gpu_says_so_where_there_is_none(config):
    run = SimpleNamespace(directory="runs/one", config=config(), chosen={"device": "cuda:99"})
    with pytest.raises(InputError, match=r"^runs/one: the run began on cuda:99, which .*; resume it on"):
        setup.device_of(run)


def test_another_model_or_reward_on_resume_is_refused_by_name(config, folder):
    run = GRPO(str(folder), ROWS, "last_number", config()).train().run
    with pytest.raises(InputError, match=r"rewards was .*last_number.* cannot become .*math_verify"):
        GRPO.resume(run.directory, dataset=ROWS, rewards="math_verify")
    with pytest.raises(InputError, match=r"model was .* and cannot become 'smollm2-135m-instruct'"):
        GRPO.resume(run.directory, dataset=ROWS, model="smollm2-135m-instruct")
    with pytest.raises(InputError, match="its model did not come from Python"):
        GRPO.resume(run.directory, dataset=ROWS, model=tiny_model())
    with pytest.raises(
        InputError, match="its eval_dataset did not come from Python"
    ):  # it would alter what is trained on
        GRPO.resume(run.directory, dataset=ROWS, eval_dataset=ROWS)


# --- failures


def failing_at(step, result):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step >= step and len(completions) > 1:  # not in the calls that look for the row
            return result(completions)
        return letter_a(completions)

    return reward


def test_a_wrong_count_at_step_1_leaves_the_evaluation_before_it(config, folder):
    def reward(completions, **kwargs):
        return letter_a(completions)[:2]  # right for the two held-out rows

    trainer = GRPO(str(folder), ROWS, reward, config())
    with pytest.raises(InputError, match="reward function 'reward' returned 2 values for 8 completions"):
        trainer.train()
    (record,) = lines(trainer.run.directory / "metrics.jsonl")
    assert "eval/reward" in record
    assert len(lines(trainer.run.directory / "samples.jsonl")) == 2


def test_a_reward_that_fails_later_costs_no_step_that_was_taken(config, folder, capfd):
    broken = failing_at(2, lambda completions: letter_a(completions)[:-1])
    settings = config(steps=4)
    with pytest.raises(InputError, match="returned 7 values for 8 completions"):
        GRPO(str(folder), ROWS, broken, settings).train()
    way_on = f"go on with resume({str(settings.out)!r}, dataset=…, rewards=…) from Python"
    assert way_on in "".join(capfd.readouterr().err.split("\n"))
    resumed = GRPO.resume(settings.out, dataset=ROWS, rewards=letter_a).train().run
    whole = GRPO(
        str(folder), ROWS, letter_a, settings.model_copy(update={"out": settings.out.parent / "whole"})
    ).train()
    found, expected = (untimed(run.records()) for run in (resumed, whole.run))
    assert json.dumps(found).replace("rewards/reward/", "rewards/letter_a/") == json.dumps(expected)


def test_an_evaluation_that_fails_keeps_the_last_step_and_is_made_up_for(config, folder):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 3:  # the evaluation after the third and last step
            raise KeyError("no such row")
        return letter_a(completions)

    trainer = GRPO(str(folder), ROWS, reward, config())
    with pytest.raises(InputError, match=r"'reward' raised KeyError: 'no such row'.*; row 0 of the batch of 2"):
        trainer.train()
    assert [record["step"] for record in trainer.run.records()] == [0, 1, 2, 3]
    assert "Steps: 3" in (trainer.run.directory / "final" / "README.md").read_text()
    resumed = GRPO.resume(trainer.run.directory, dataset=ROWS, rewards=letter_a).train().run
    last = resumed.records()[-1]
    assert last["step"] == 3
    assert "eval/reward" in last
    assert "learning_rate" not in last
    assert (resumed.directory / "final" / "model.safetensors").exists()


def test_losses_that_are_not_finite_are_not_taken_and_stop_the_run(config, folder):
    settings = config(steps=9, stop_after_non_finite=3, eval_rows=0)
    trainer = GRPO(str(folder), ROWS, high_ids, settings)
    trainer.policy.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    with pytest.raises(RunError, match=r"gradient norm nan: not finite, 3 times in a row \(stop_after_non_finite\)"):
        trainer.train()
    for name, tensor in trainer.policy.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [record["updates_skipped"] for record in trainer.run.records()] == [1, 1]
    assert all(record["grad_norm"] is None for record in trainer.run.records())


def test_rewards_beyond_float32_are_no_reason_to_stop(config, folder):
    """Advantages are relative to their group, in float64: 1e200 is as good as 1, but not without a scale."""

    def huge(completions, **kwargs):
        return [1e200 * value for value in letter_a(completions)]

    records = GRPO(str(folder), ROWS, huge, config(eval_rows=0)).train().run.records()
    assert all(record["updates_skipped"] == 0 for record in records)
    settings = config(out=config().out.parent / "raw", eval_rows=0, scale_rewards="none", stop_after_non_finite=1)
    with pytest.raises(RunError, match=r"loss .*: not finite, 1 times in a row"):
        GRPO(str(folder), ROWS, huge, settings).train()


def test_rewards_that_apply_to_nothing_train_nothing(config, folder):
    def never(completions, **kwargs):
        return [None] * len(completions)

    trainer = GRPO(str(folder), ROWS, never, config()).train()
    start = load_file(folder / "model.safetensors")
    for name, tensor in start.items():
        assert torch.equal(trainer.policy.model.state_dict()[name], tensor)
    assert all(record["reward"] is None for record in trainer.run.records()[1:])
    assert all("kl" not in record for record in trainer.run.records())


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "the data set is empty"),
        ([{"words": "1"}], {}, "no column 'prompt'; the data has words"),
        (ROWS[:2], {}, "eval_rows is 2: cannot hold out 2 of 2 rows"),
        (
            [*ROWS, {"prompt": "1" * 200}],
            {},
            "row 13 of the data: its prompt has 203 tokens; with max_tokens 6 that is ",
        ),
        ([*ROWS, {"prompt": 5}], {}, r"row 13 of the data: the prompt is 5 \(int\)"),
        (ROWS, {"lora_rank": 2, "lora_targets": ("nothing",)}, r"lora_targets is \('nothing',\): .*nothing"),
        (ROWS, {"eval_dataset": "absent.jsonl"}, "no such data file: 'absent.jsonl'"),
    ],
)
def test_bad_data_and_settings_are_named_before_anything_is_written(config, folder, rows, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        GRPO(str(folder), rows, letter_a, config(**changes))
    assert "\n" not in str(caught.value)
    assert not config().out.exists()


def test_something_that_is_no_model_is_named(config):
    with pytest.raises(InputError, match="model is 3, expected a name, a folder or a model object"):
        GRPO(3, ROWS, letter_a, config())


def test_rewards_that_teach_nothing_are_said(config, folder, capfd):
    def nothing(completions, **columns):
        return [None] * len(completions)

    GRPO(str(folder), ROWS, nothing, config(steps=6, eval_rows=0)).train()
    said = capfd.readouterr().err
    assert said.count("no reward function applies to any completion") == 1
    assert "every completion has earned" not in said

    def same(completions, **columns):
        return [2.0] * len(completions)

    GRPO(str(folder), ROWS, same, config(steps=7, eval_rows=0, out=config().out / "same")).train()
    said = capfd.readouterr().err
    assert said.count("for 5 steps every completion has earned 2, so that nothing is learned") == 1
    assert "step 5: for 5 steps" in said

    def by_step(completions, trainer_state, **columns):
        return [float(trainer_state.global_step)] * len(completions)

    GRPO(str(folder), ROWS, by_step, config(steps=7, eval_rows=0, out=config().out / "by-step")).train()
    assert "every completion has earned" not in capfd.readouterr().err


def test_a_reward_that_ends_the_program_is_named(config, folder):
    def leaves(completions, **columns):
        raise SystemExit(3)

    with pytest.raises(InputError, match=r"reward function 'leaves' raised SystemExit: 3 at .*test_grpo_run.py"):
        GRPO(str(folder), ROWS, leaves, config(eval_rows=0)).train()


def test_a_held_out_set_of_its_own_takes_its_prompts_out_of_training(config, folder, capfd):
    trainer = GRPO(str(folder), ROWS, letter_a, config(), eval_dataset=[ROWS[3], {"prompt": "x"}, ROWS[5]])
    assert [row["prompt"] for row in trainer.held_out.rows] == [ROWS[3]["prompt"], "x"]  # the first eval_rows
    assert ROWS[3]["prompt"] not in [row["prompt"] for row in trainer.prompts.rows]
    assert ROWS[5]["prompt"] in [row["prompt"] for row in trainer.prompts.rows]
    assert "1 training rows left out" in capfd.readouterr().err


@pytest.mark.parametrize(("rows", "held_out"), [(5, 0), (30, 3)])
def test_by_default_a_small_data_set_gives_up_a_tenth(config, folder, rows, held_out, capfd):
    data = [{"prompt": str(number)} for number in range(rows)]
    trainer = GRPO(str(folder), data, letter_a, config(eval_rows=None))
    assert (len(trainer.held_out), len(trainer.prompts)) == (held_out, rows - held_out)
    assert ("nothing is held out of so few rows" in capfd.readouterr().err) == (held_out == 0)


def test_by_default_a_large_data_set_gives_up_two_hundred(config):
    reader = PromptReader.of(config(prompt_format="text"), tiny_tokenizer(), tiny_model())
    train, held_out, dropped = train_and_held_out(reader, [{"prompt": str(i)} for i in range(2300)], None, None, 0)
    assert (len(train), len(held_out), dropped) == (2100, 200, 0)


def test_names_given_from_python_are_checked_with_the_other_settings(config, folder):
    with pytest.raises(InputError, match="given from Python: 1 reward_weights for 2 rewards"):
        GRPO(str(folder), ROWS, ["last_number", "math_verify"], config(reward_weights=(1.0,)))
