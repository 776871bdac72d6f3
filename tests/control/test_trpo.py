"""TRPO: its step on real rollouts and in closed form, an environment that it solves, and a run that is resumed."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_environments import advantages_by_hand, same_records, same_weights, unbroken_and_resumed

from taurl.control.algorithms.trpo import TRPO, Batch
from taurl.control.algorithms.trpo_config import TRPOConfig
from taurl.functional.whitening import whiten

SMALL = {
    "environments": 4,
    "rollout_steps": 64,
    "critic_epochs": 2,
    "record_every": 1,
    "eval_episodes": 0,
    "video": False,
}


class Echo(gymnasium.Env):
    """The reward is 1 where the action is the digit that was shown; after 8 digits a time limit cuts."""

    observation_space = spaces.Discrete(3)
    LENGTH = 8

    def __init__(self, action_space=None):
        self.action_space = action_space or spaces.Discrete(3)

    def _shown(self):
        return self.steps * 2 % 3

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._shown(), {}

    def step(self, action):
        reward = float(self._right(action))
        self.steps += 1
        return self._shown(), reward, False, self.steps == self.LENGTH, {}

    def _right(self, action):
        match self.action_space:
            case spaces.Discrete():
                return action == self._shown()
            case spaces.Box():
                return -abs(float(action[0]) - self._shown())
            case _:
                return np.mean(np.asarray(action) == self._shown() % 2)


def rollout_of(trainer: TRPO):
    return trainer.collector.collect(trainer.policy.actor, trainer.critic, trainer.config.rollout_steps)


def batch_of(trainer: TRPO, *, equal: bool = False) -> Batch:
    rollout = rollout_of(trainer)
    observations, actions = rollout.observations[rollout.valid], rollout.actions[rollout.valid]
    advantages = torch.full((len(actions),), 3.0) if equal else torch.randn(len(actions))
    return Batch(observations, actions, advantages, torch.randn(len(actions)))


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("max_kl", [0.001, 0.05])
def test_the_step_raises_the_surrogate_and_stays_within_the_divergence(tmp_path, env, max_kl):
    trainer = TRPO(env, TRPOConfig(out=tmp_path / "run", max_kl=max_kl, **SMALL))
    batch = batch_of(trainer)
    observations, actions, advantages = batch[:3]
    distribution, actor = trainer.policy.distribution, trainer.policy.actor
    with torch.no_grad():
        old = actor(observations)
    figures = trainer._improve(batch)
    with torch.no_grad():
        new = actor(observations)
        # By the density of each sample and an average over many draws, not by the functions that the step used.
        ratios = distribution.logprobs(new, actions).exp() / distribution.logprobs(old, actions).exp()
        gain = float((ratios * advantages).mean() - advantages.mean() * ratios.mean())
        draws = [torch.from_numpy(distribution.sample(old.numpy())) for _ in range(500)]
        changes = torch.stack([distribution.logprobs(new, a) - distribution.logprobs(old, a) for a in draws])
    divergence = float((changes.expm1() - changes).mean())
    assert figures["train/step_accepted"] == 1.0
    assert gain > 0
    assert divergence == pytest.approx(figures["train/kl"], rel=0.03)
    assert 0.3 * max_kl < figures["train/kl"] <= max_kl


def test_the_step_of_a_linear_gaussian_policy_is_the_natural_gradient_in_closed_form(tmp_path):
    """μ = W x + b, σ: the Fisher matrix is E[x̃ x̃ᵀ]/σ² for (W, b), x̃ = (x, 1), and 2 for log σ."""
    settings = {**SMALL, "rollout_steps": 256, "max_kl": 1e-5}
    trainer = TRPO("Pendulum-v1", TRPOConfig(out=tmp_path / "run", hidden=(), damping=0.0, **settings))
    batch = batch_of(trainer)
    observations, actions, advantages = batch[:3]
    actor = trainer.policy.actor
    with torch.no_grad():
        actor.log_std.fill_(-0.5)
        before = torch.cat([p.reshape(-1) for p in (*actor.layers.linears[0].parameters(), actor.log_std)]).double()
        x = torch.cat([observations, torch.ones(len(actions), 1)], 1).double()
        error = (actions[:, 0].double() - x @ before[:4]) / np.exp(-0.5)  # standard normal
        weighted = whiten(advantages).double()
        # ∇log π of (W, b) is error/σ · x̃, and of log σ error² − 1.
        gradient = torch.cat([(weighted * error / np.exp(-0.5)) @ x, (weighted * (error**2 - 1)).sum()[None]])
        gradient /= len(x)
        fisher = torch.zeros(5, 5, dtype=torch.float64)
        fisher[:4, :4] = x.T @ x / len(x) / np.exp(-1.0)
        fisher[4, 4] = 2.0
        direction = torch.linalg.solve(fisher, gradient)
        expected = direction * torch.sqrt(2e-5 / (direction @ fisher @ direction))
    figures = trainer._improve(batch)
    after = torch.cat([p.detach().reshape(-1) for p in (*actor.layers.linears[0].parameters(), actor.log_std)]).double()
    assert figures["train/step_accepted"] == 1.0
    taken = (after - before) / figures["train/step_fraction"]
    assert torch.allclose(taken, expected, rtol=2e-3, atol=1e-6)


def test_advantages_and_returns_are_those_of_gae(tmp_path):
    trainer = TRPO("CartPole-v1", TRPOConfig(out=tmp_path / "run", discount=0.9, trace_decay=0.7, **SMALL))
    rollout, fit, seen = rollout_of(trainer), trainer._fit, []
    trainer._fit = lambda batch, rate: seen.append(batch) or fit(batch, rate)
    trainer._iterate(rollout, 256)
    expected = advantages_by_hand(rollout, discount=0.9, trace_decay=0.7)
    torch.testing.assert_close(seen[0].advantages, expected[rollout.valid])
    torch.testing.assert_close(seen[0].returns, (expected + rollout.values)[rollout.valid])


def test_nothing_moves_where_the_advantages_are_equal(tmp_path):
    trainer = TRPO("CartPole-v1", TRPOConfig(out=tmp_path / "run", **SMALL))
    before = {name: tensor.clone() for name, tensor in trainer.policy.actor.state_dict().items()}
    figures = trainer._improve(batch_of(trainer, equal=True))
    assert figures["train/step_accepted"] == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.policy.actor.state_dict().items())


@pytest.mark.parametrize(
    ("action_space", "best"),
    [
        (spaces.Discrete(3), 8.0),
        (spaces.MultiDiscrete([2, 2]), 8.0),
        (spaces.MultiBinary(2), 8.0),
        (spaces.Box(-3.0, 3.0, (1,)), 0.0),
    ],
)
def test_an_environment_that_says_what_to_do_is_solved(tmp_path, action_space, best):
    box = isinstance(action_space, spaces.Box)
    config = TRPOConfig(
        out=tmp_path / "run",
        steps=8192 if box else 1024,
        environments=4,
        rollout_steps=64,
        discount=0.0,
        max_kl=0.1,
        damping=0.01,
        eval_episodes=0,
    )
    trainer = TRPO(lambda: Echo(action_space), config).train()
    found = float(np.mean(trainer.evaluate(4).returns))
    assert found > -1.5 if box else found == best


def test_the_critic_goes_down_the_squared_error(tmp_path):
    """One epoch of one minibatch, against automatic differentiation and PyTorch's Adam."""
    settings = {**SMALL, "critic_epochs": 1, "minibatch_size": 256, "learning_rate": 0.01, "max_grad_norm": 1e9}
    trainer = TRPO("Pendulum-v1", TRPOConfig(out=tmp_path / "run", **settings))
    batch = batch_of(trainer)
    twin = copy.deepcopy(trainer.critic)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    adam.zero_grad()
    (0.5 * (twin(batch.observations) - batch.returns) ** 2).mean().backward()
    adam.step()
    trainer._fit(batch, 0.01)
    for one, other in zip(trainer.critic.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_critic_learns_that_a_time_limit_is_no_end(tmp_path):
    """A reward of 1 for ever is worth 1/(1 − γ) = 5, though every episode is cut after 8 steps."""

    class Endless(Echo):
        def _right(self, action):
            return 1.0

    settings = {**SMALL, "critic_epochs": 10, "minibatch_size": 64, "learning_rate": 5e-3}
    trainer = TRPO(Endless, TRPOConfig(out=tmp_path / "run", steps=15_000, discount=0.8, **settings)).train()
    values = trainer.critic(torch.eye(3))
    assert values.detach().numpy() == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, env):
    settings = {**SMALL, "normalize_observations": True, "normalize_rewards": True, "save_every": 512, "steps": 1280}
    whole, resumed = unbroken_and_resumed(TRPO, TRPOConfig, tmp_path, stop_after=600, env=env, **settings)
    assert same_weights(whole, resumed)
    assert torch.equal(whole.optimizer.parameters, resumed.optimizer.parameters)
    assert same_records(whole, resumed)


def test_a_run_in_one_object_whose_iterations_are_shorter_than_a_minibatch_goes_on(tmp_path):
    settings = {"rollout_steps": 16, "record_every": 16, "eval_episodes": 0}
    TRPO(Echo(), TRPOConfig(out=tmp_path / "run", steps=16, **settings)).train()
    assert TRPO.resume(tmp_path / "run", env=Echo(), steps=32).train().run.step == 32
