"""Evaluation: whole episodes, each copy its share, in environments of its own."""

import numpy as np
import pytest
from gymnasium import spaces
from small_environments import Counting, resetting_on_the_next_step

from taurl.control.algorithms.ppo import PPO
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.environments import Environments
from taurl.control.evaluation import Evaluation, evaluate

SMALL = {"environments": 1, "rollout_steps": 16, "minibatch_size": 16, "record_every": 16, "eval_episodes": 3}


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
