"""Evaluation: whole episodes, each copy its share, in environments of its own."""

from unittest.mock import Mock

import numpy as np
import pytest
from gymnasium import spaces
from small_environments import Counting, Endless, resetting_on_the_next_step

import taurl.llm
from taurl.control import load
from taurl.control.algorithms.grpo import GRPO
from taurl.control.algorithms.grpo_config import GRPOConfig
from taurl.control.algorithms.ppo import PPO
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.environments import Environments
from taurl.control.evaluation import Evaluation, evaluate, evaluation_seed
from taurl.control.playing import play
from taurl.control.trainer import PICTURE
from taurl.report import write_report
from taurl.runtime.errors import InputError

SMALL = {
    "environments": 1,
    "rollout_steps": 16,
    "minibatch_size": 16,
    "record_every": 16,
    "eval_episodes": 3,
    "video": False,
}


class Zeros:
    def act(self, batch, *, deterministic=True):
        return np.zeros(len(batch), dtype=int)


class Uneven(Counting):
    """Every second copy has episodes of one step, the others of ten; the return is the length."""

    observation_space = spaces.Box(0, 100, (2,), np.float32)
    made = 0

    def __init__(self):
        super().__init__()
        type(self).made += 1
        self.length = 1 if self.made % 2 else 10

    def step(self, action):
        self.step_number += 1
        return self._shown(), 1.0, self.step_number == self.length, False, {}


@pytest.mark.parametrize("mode", ["same_step", "next_step"])
@pytest.mark.parametrize("episodes", [8, 9, 3])
def test_each_copy_plays_its_share(mode, episodes, monkeypatch):
    if mode == "next_step":
        resetting_on_the_next_step(monkeypatch)
    Uneven.made = 0
    found = evaluate(Zeros(), Environments(Uneven, 4, seed=0), episodes)
    short = {8: 4, 9: 5, 3: 2}[episodes]  # the first to finish would all be short ones
    assert sorted(found.lengths) == [1] * short + [10] * (episodes - short)
    assert found.returns == [float(length) for length in found.lengths]


def test_an_evaluation_ends_though_an_episode_does_not():
    found = evaluate(Zeros(), Environments(lambda: Endless(limit=10**9), 2, seed=0), 4, longest=50)
    assert found.lengths == [50] * 4
    with pytest.raises(InputError, match="episodes is 0: expected at least one"):
        evaluate(Zeros(), Environments(Uneven, 2, seed=0), 0)


def test_a_target_that_no_evaluation_could_reach_is_refused():
    with pytest.raises(ValueError, match="stop_at is 475, but nothing is evaluated along the way"):
        PPOConfig(stop_at=475.0)


def test_one_environment_object_is_one_copy_and_its_rollout_one_minibatch(tmp_path):
    trainer = PPO(Counting(), PPOConfig(out=tmp_path / "run", steps=128, eval_episodes=0)).train()
    assert trainer.config.environments == 1
    seen = []
    settings = PPOConfig(steps=4096, eval_episodes=0)
    longer = PPO.resume(tmp_path / "run", settings, env=Counting(), callbacks=[seen.append]).train()
    assert seen == longer.run.records()[-len(seen) :]
    assert longer.run.step == 4096
    with pytest.raises(InputError, match="episodes is 0"):
        PPO("CartPole-v1", PPOConfig(out=tmp_path / "other", eval_episodes=0)).evaluate()
    with pytest.raises(InputError, match="environments is 64, but one environment object was given"):
        GRPO(Counting(), GRPOConfig(out=tmp_path / "grpo"))


def test_an_evaluation_that_fails_does_not_undo_what_was_learned(tmp_path, monkeypatch):
    trainer = PPO("CartPole-v1", PPOConfig(out=tmp_path / "run", steps=32, **SMALL))
    monkeypatch.setattr(trainer, "evaluate", Mock(side_effect=RuntimeError("no memory for copies")))
    with pytest.raises(RuntimeError, match="no memory for copies"):
        trainer.train()
    assert PPO.resume(tmp_path / "run").run.step == 32


def test_the_metrics():
    found = Evaluation([1.0, 2.0, 6.0], [1, 2, 3]).metrics()
    assert found == {
        "eval/mean_reward": 3.0,
        "eval/std_reward": pytest.approx(np.sqrt(14 / 3)),
        "eval/reward_p10": pytest.approx(1.2),
        "eval/reward_p50": 2.0,
        "eval/reward_p90": pytest.approx(5.2),
        "eval/mean_ep_length": 2.0,
    }


def test_training_goes_on_alike_with_and_without_evaluations(tmp_path):
    def weights(name, **settings):
        config = PPOConfig(env="CartPole-v1", out=tmp_path / name, steps=128, **{**SMALL, **settings})
        return PPO(config=config).train().policy.actor.layers.linears[0].weight

    assert (weights("often", eval_every=16) == weights("never", eval_episodes=0)).all()


def test_an_environment_that_is_the_only_one_begins_anew_after_its_evaluation(tmp_path):
    environment = Counting()
    trainer = PPO(environment, PPOConfig(out=tmp_path / "run", steps=64, eval_every=16, **SMALL))
    for record in trainer.steps():
        assert record["eval/mean_ep_length"] == pytest.approx(3, abs=1)
        seen = trainer.environments.observations[0].tolist()
        assert seen == [environment.episode, environment.step_number], "what is acted on is not where it stands"


class Closing(Counting):
    """Refuses to go on once it was closed; can be drawn."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    render_mode, closed = "rgb_array", False

    def step(self, action):
        assert not self.closed
        return super().step(action)

    def render(self):
        return np.zeros((20, 20, 3), np.uint8)

    def close(self):
        self.closed = True


def test_an_environment_that_was_given_is_left_open_and_one_that_was_made_is_closed(tmp_path):
    given = Closing()
    trainer = PPO(given, PPOConfig(out=tmp_path / "given", steps=32, **{**SMALL, "video": True})).train()
    play(trainer.policy, given, {}, video=tmp_path / "out.gif", episodes=1, seed=0, sampled=False)
    assert len(trainer.evaluate(4).returns) == 4
    assert (tmp_path / "given" / "artifacts" / PICTURE).exists()
    assert not given.closed
    made = []
    settings = PPOConfig(out=tmp_path / "made", steps=32, **{**SMALL, "video": True})
    PPO(lambda: made.append(Closing()) or made[-1], settings).train()
    assert len(made) > 4  # of training, of evaluation and of the picture
    assert all(one.closed for one in made)


def test_neighbouring_seeds_are_evaluated_on_other_episodes_than_they_train_on():
    begun = [range(seed, seed + 100) for seed in map(evaluation_seed, range(50))]
    trained = range(1000)
    assert len({seed for episodes in (*begun, trained) for seed in episodes}) == 50 * 100 + 1000
    assert evaluation_seed(3) == evaluation_seed(3)


def test_an_evaluation_that_is_repeated_finds_the_same(tmp_path):
    trainer = PPO("CartPole-v1", PPOConfig(out=tmp_path / "run", steps=64, **SMALL))
    assert trainer.evaluate(7).returns == trainer.evaluate(7).returns
    trainer.environments.close()


def test_best_is_the_policy_that_evaluated_best(tmp_path):
    # One that is learned fast and then spoiled by far too large steps; how rounding goes decides which seed does so.
    settings = {"environments": 8, "rollout_steps": 32, "epochs": 5, "learning_rate": 3e-2, "record_every": 256}
    for seed in range(6):
        config = PPOConfig(out=tmp_path / f"{seed}", seed=seed, steps=4096, eval_every=512, eval_episodes=5, **settings)
        trainer = PPO("CartPole-v1", config).train()
        means = [record["eval/mean_reward"] for record in trainer.run.records() if "eval/mean_reward" in record]
        if max(means) > means[-1]:
            break
    assert max(means) > means[-1], "nothing to tell apart"
    last = trainer.evaluate().metrics()["eval/mean_reward"]
    trainer.policy = PPO.load(config.out / "best")
    assert trainer.evaluate().metrics()["eval/mean_reward"] == max(means) == trainer.best
    assert last == means[-1]


def test_a_run_stops_where_an_evaluation_reaches_the_target_and_may_go_on(tmp_path):
    config = PPOConfig(env="CartPole-v1", out=tmp_path / "run", steps=96, eval_every=16, stop_at=8.0, **SMALL)
    trainer = PPO(config=config).train()
    assert trainer.run.step == 16  # no episode of CartPole is shorter than 8
    assert load(tmp_path / "run").facts["env"] == "CartPole-v1"
    assert "Finished at step 16" in write_report(tmp_path / "run").read_text()
    gone_on = PPO.resume(tmp_path / "run", config.model_copy(update={"stop_at": None})).train()
    assert gone_on.run.step == 96


def test_a_target_reached_at_the_last_step_has_stopped_nothing(tmp_path):
    config = PPOConfig(env="CartPole-v1", out=tmp_path / "run", steps=16, eval_every=16, stop_at=8.0, **SMALL)
    PPO(config=config).train()
    page = write_report(tmp_path / "run").read_text()
    assert "Finished at step 16" in page
    assert "stopped before" not in page


def test_a_config_of_another_algorithm_is_refused_by_its_name(tmp_path):
    PPO("CartPole-v1", PPOConfig(out=tmp_path / "run", steps=16, **SMALL)).train()
    wrong = taurl.llm.PPOConfig(out=tmp_path / "other")
    said = (
        r"config is a taurl\.llm\.algorithms\.ppo_config\.PPOConfig, "
        r"expected a taurl\.control\.algorithms\.ppo_config\.PPOConfig"
    )
    with pytest.raises(InputError, match=said):
        PPO("CartPole-v1", wrong)
    with pytest.raises(InputError, match=said):
        PPO.resume(tmp_path / "run", wrong)


def test_what_is_saved_is_loaded_by_either_name_and_acts_alike(tmp_path):
    trainer = PPO("CartPole-v1", PPOConfig(out=tmp_path / "run", steps=16, **SMALL)).train()
    trainer.save(tmp_path / "policy")
    batch = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    expected = trainer.policy.act(batch)
    assert 0 < expected.sum() < 20
    for folder in ("policy", "run", "run/final", "run/best"):
        assert (load(tmp_path / folder).act(batch) == expected).all()
    assert PPO.load(str(tmp_path / "policy")).predict(batch[0]) == trainer.predict(batch[0]) == expected[0]


@pytest.mark.parametrize(
    ("file", "content"),
    [("policy.json", "{"), ("policy.json", "{}"), ("policy.json", "[]"), ("policy.safetensors", "x")],
)
def test_a_damaged_policy_is_named_in_one_line(tmp_path, file, content):
    PPO("CartPole-v1", PPOConfig(out=tmp_path / "run", steps=16, **SMALL)).save(tmp_path / "policy")
    (tmp_path / "policy" / file).write_text(content)
    with pytest.raises(InputError, match=r"policy: the policy there cannot be read \(.+\)$") as caught:
        load(tmp_path / "policy")
    assert "\n" not in str(caught.value)
