"""Normalisation: equal to numpy over the whole stream, frozen in evaluation, saved with the policy."""

import numpy as np
import pytest
import torch
from small_environments import Counting, Endless

from taurl.control.algorithms.ppo import PPO
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.normalization import BOUND, Normalizer
from taurl.control.policies import Policy

SCALES = {"normalize_observations": True, "normalize_rewards": True}
SMALL = {
    "environments": 4,
    "rollout_steps": 16,
    "minibatch_size": 32,
    "record_every": 64,
    "eval_episodes": 0,
    "video": False,
}


def test_observations_are_those_of_numpy():
    normalizer = Normalizer(3, 4, observations=True, rewards=False, discount=0.9)
    stream = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 1e-3]) + 5
    found = [normalizer.observe(batch) for batch in stream]
    seen = stream.double().numpy().reshape(-1, 3)
    np.testing.assert_allclose(normalizer.seen.mean, seen.mean(0))
    np.testing.assert_allclose(normalizer.seen.variance, seen.var(0))
    expected = (stream[-1].double().numpy() - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)
    np.testing.assert_allclose(found[-1], expected, rtol=1e-5)
    np.testing.assert_array_equal(normalizer.apply(torch.tensor([5.0, 1e9, 5.0]))[1], BOUND)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_sums():
    normalizer = Normalizer(1, 2, observations=False, rewards=True, discount=0.5)
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    done = torch.tensor([[False, True], [False, False], [False, False]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    scaled = normalizer.rewards(rewards, done, valid).numpy()
    sums = [1.0, 2.0, 3.5, 4.0, 6.75]  # 2.0 ended an episode; the last step of the second copy only reset
    for t, count in enumerate((2, 4, 5)):
        deviation = np.sqrt(np.var(sums[:count]) + 1e-8)
        np.testing.assert_allclose(scaled[t], np.clip(rewards[t].numpy() / deviation, -BOUND, BOUND), rtol=1e-6)


def test_what_is_not_asked_for_passes_through():
    normalizer = Normalizer(2, 2, observations=False, rewards=False, discount=0.9)
    observations, rewards = torch.randn(2, 2), torch.randn(3, 2)
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    assert torch.equal(normalizer.observe(observations), observations)
    assert torch.equal(normalizer.rewards(rewards, nothing, ~nothing), rewards)
    assert normalizer.changes == 0


def test_evaluation_and_acting_leave_it_alone(tmp_path):
    trainer = PPO(lambda: Counting(), PPOConfig(out=tmp_path / "run", steps=256, **SMALL, **SCALES)).train()
    before = {name: tensor.clone() for name, tensor in trainer.policy.normalizer.tensors().items()}
    assert float(before["seen/samples"]) == 256 + 4  # and the first observations
    trainer.evaluate(5)
    trainer.predict(np.array([1.0, 2.0], np.float32))
    after = trainer.policy.normalizer.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_settings_reach_the_policy(tmp_path):
    def rollout_of(name, **settings):
        trainer = PPO("Pendulum-v1", PPOConfig(out=tmp_path / name, discount=0.8, **SMALL, **settings))
        return trainer.collector.collect(trainer.policy.actor, trainer.critic, 64)

    plain, scaled = rollout_of("plain"), rollout_of("scaled", normalize_rewards=True)
    normalizer = Normalizer(3, 4, observations=False, rewards=True, discount=0.8)
    expected = normalizer.rewards(plain.rewards, plain.terminated | plain.truncated, plain.valid)
    assert torch.equal(scaled.rewards, expected)
    assert torch.equal(scaled.observations, plain.observations)
    assert not plain.parameters[..., 1].any()
    narrow = rollout_of("narrow", initial_log_std=-1.5)
    assert (narrow.parameters[..., 1] == -1.5).all()
    seen = rollout_of("seen", normalize_observations=True).observations
    assert not torch.equal(seen, plain.observations)


def test_it_travels_with_the_policy(tmp_path):
    trainer = PPO(lambda: Counting(), PPOConfig(out=tmp_path / "run", steps=256, **SMALL, **SCALES)).train()
    loaded = Policy.load(tmp_path / "run")
    batch = np.random.default_rng(0).uniform(0, 50, (64, 2)).astype(np.float32)
    mine, theirs = (
        policy.actor(policy.normalizer.apply(torch.from_numpy(batch))) for policy in (trainer.policy, loaded)
    )
    assert torch.equal(mine, theirs)
    np.testing.assert_array_equal(trainer.policy.act(batch), loaded.act(batch))
    loaded.normalizer.load_tensors(Normalizer(2, 1, observations=True, rewards=False, discount=1.0).tensors())
    assert not torch.equal(loaded.actor(loaded.normalizer.apply(torch.from_numpy(batch))), mine)


@pytest.mark.parametrize("scales", [False, True])
def test_a_constant_observation_is_no_trouble(scales, tmp_path):
    config = PPOConfig(out=tmp_path / "run", steps=64, normalize_observations=scales, **SMALL)
    trainer = PPO(lambda: Endless(), config).train()
    assert all(parameter.isfinite().all() for parameter in trainer.policy.actor.parameters())
