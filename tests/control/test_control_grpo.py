"""GRPO in environments: groups that begin alike, the loss as plain loops, what is solved, and a run that is resumed."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from pydantic import ValidationError
from small_environments import same_records, same_weights, unbroken_and_resumed

from taurl.control.algorithms.grpo import GRPO
from taurl.control.algorithms.grpo_config import GRPOConfig

SMALL = {"environments": 8, "group_size": 4, "record_every": 1, "eval_episodes": 0, "video": False}


class Echo(gymnasium.Env):
    """The reward is 1 where the action is the digit that is shown; choosing 2 makes an episode of 8 to 10 shorter."""

    observation_space = spaces.Discrete(3)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.shown = int(self.np_random.integers(8, 11)), int(self.np_random.integers(3))
        return self.shown, {}

    def step(self, action):
        reward = float(action == self.shown)
        self.left, self.shown = self.left - 1 - (action == 2), int(self.np_random.integers(3))
        return self.shown, reward, self.left <= 0, False, {}


class Endless(Echo):
    """One that never ends by itself, nor by a time limit."""

    def step(self, action):
        self.left = 99
        return super().step(action)


def trainer_of(tmp_path, env="CartPole-v1", **settings) -> GRPO:
    return GRPO(env, GRPOConfig(out=tmp_path / "run", **{**SMALL, **settings}))


def weights_of(trainer: GRPO) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.actor.parameters()]


def test_the_copies_of_a_group_begin_alike_and_groups_and_iterations_do_not(tmp_path):
    trainer = trainer_of(tmp_path)
    first, second = (trainer._play(step).observations[0].reshape(2, 4, 4) for step in (0, 999))
    for beginning in (first, second):
        assert (beginning == beginning[:, :1]).all()
        assert (beginning[0] != beginning[1]).any()
    assert (first[:, 0] != second[:, 0]).any(1).all()
    assert torch.equal(trainer._play(0).observations[0].reshape(2, 4, 4), first)


def test_an_episode_is_trained_on_up_to_its_end_and_no_further(tmp_path):
    trainer = trainer_of(tmp_path)
    rollout = trainer._play(0)
    lengths = rollout.valid.sum(0)
    assert len(set(lengths.tolist())) > 1
    assert lengths.max() == len(rollout.valid)
    for copy, length in enumerate(lengths):
        assert rollout.valid[:length, copy].all()
        assert rollout.terminated[:, copy].nonzero().flatten().tolist() == [length - 1]
        assert rollout.rewards[:, copy].sum() == length
    # The episodes that count are these eight, and none that a waiting copy was stepped on through.
    assert sorted(one.length for one in trainer.environments.recent) == sorted(lengths.tolist())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_a_plain_loop_over_the_episodes(tmp_path, loss_type, masked):
    trainer = trainer_of(tmp_path, Echo, loss_type=loss_type, discount=0.9, clip_low=0.1, clip_high=0.3, epochs=1,
                         minibatches=1, mask_truncated=masked, max_episode_steps=6, hidden=(5,))  # fmt: skip
    rollout = trainer._play(0)
    with torch.no_grad():  # so that ratios are not 1, and some are clipped
        for parameter in trainer.policy.actor.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    given = []
    trainer.optimizer.update = lambda rate, episodes: given.append(episodes) or (0.0, trainer._loss(episodes)[1])
    trainer._update(rollout, 1)
    loss, figures = trainer._loss(given[0])
    loss.backward()
    found = [parameter.grad.clone() for parameter in trainer.policy.actor.parameters()]

    lengths = rollout.valid.sum(0).tolist()
    cut = [not rollout.terminated[:, episode].any() for episode in range(8)]
    assert 0 < sum(cut) < 8
    returns = [sum(0.9**t * float(rollout.rewards[t, i]) for t in range(lengths[i])) for i in range(8)]
    counted = [i for i in range(8) if not (masked and cut[i])]
    steps = sum(lengths[i] for i in counted)
    expected = torch.zeros(())
    clipped = divergence = 0
    for i in counted:
        group = returns[i // 4 * 4 : i // 4 * 4 + 4]
        mean = sum(group) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        advantage = (returns[i] - mean) / (deviation + 1e-4)
        for t in range(lengths[i]):
            logits = trainer.policy.actor(rollout.observations[t, i])
            logprob = logits[rollout.actions[t, i]] - logits.logsumexp(0)
            ratio = torch.exp(logprob - rollout.logprobs[t, i])
            bounded = min(max(ratio, torch.tensor(0.9)), torch.tensor(1.3))
            clipped += not 0.9 < ratio < 1.3
            divergence += ratio.item() - 1 - math.log(ratio.item())  # k3, of steps that the policy before drew
            gain = torch.minimum(ratio * advantage, bounded * advantage)
            share = {"grpo": len(counted) * lengths[i], "dapo": steps, "dr_grpo": len(counted) * 6}[loss_type]
            expected = expected - gain / share
    assert clipped > 3
    assert figures["train/approx_kl"].item() == pytest.approx(divergence / steps, rel=1e-3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for one, other in zip(found, torch.autograd.grad(expected, trainer.policy.actor.parameters()), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_the_first_ratio_is_1_and_groups_without_variance_teach_nothing(tmp_path):
    class Equal(Echo):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, 0.0, *rest

    trainer = trainer_of(tmp_path, Equal, epochs=1, minibatches=1)
    before = weights_of(trainer)
    figures = trainer._update(trainer._play(0), 1)
    assert figures["train/approx_kl"] == pytest.approx(0.0, abs=1e-10)
    assert figures["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(one, other) for one, other in zip(before, weights_of(trainer), strict=True))


def test_an_episode_that_does_not_end_is_cut_and_counts_as_such(tmp_path):
    trainer = trainer_of(tmp_path, Endless, max_episode_steps=5, mask_truncated=True)
    rollout = trainer._play(0)
    assert rollout.valid.shape == (5, 8)
    assert [one.length for one in trainer.environments.recent] == [5] * 8
    before = weights_of(trainer)
    assert trainer._update(rollout, 1)["loss"] == 0.0
    assert all(torch.equal(one, other) for one, other in zip(before, weights_of(trainer), strict=True))


def test_an_environment_that_says_what_to_do_is_solved(tmp_path):
    settings = {"environments": 32, "group_size": 8, "steps": 10_000, "learning_rate": 3e-3}
    trainer = trainer_of(tmp_path, Echo, **settings).train()
    found = trainer.evaluate(50)
    assert found.returns == found.lengths


def test_continuous_actions_are_trained_on(tmp_path):
    """A linear policy that should follow the sign of what it sees: the mean reward per step nears 0."""

    class Follow(Echo):
        observation_space = spaces.Box(-1.0, 1.0, (1,))
        action_space = spaces.Box(-2.0, 2.0, (1,))

        def _seen(self):
            return np.array([self.shown - 1.0], dtype=np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self._seen(), {}

        def step(self, action):
            reward = -abs(float(action[0]) - (self.shown - 1.0))
            _, _, *rest = super().step(0)
            return self._seen(), reward, *rest

    settings = {"environments": 32, "group_size": 8, "steps": 20_000, "learning_rate": 1e-2, "hidden": ()}
    trainer = trainer_of(tmp_path, Follow, **settings)
    before = trainer.evaluate(50)
    after = trainer.train().evaluate(50)
    assert sum(before.returns) / sum(before.lengths) < -0.6
    assert sum(after.returns) / sum(after.lengths) > -0.15


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    settings = {**SMALL, "normalize_observations": True, "save_every": 1000, "steps": 3000}
    whole, resumed = unbroken_and_resumed(GRPO, GRPOConfig, tmp_path, stop_after=1000, env="CartPole-v1", **settings)
    assert same_weights(whole, resumed)
    assert same_records(whole, resumed)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="environments 30 is not a multiple of group_size 8"):
        GRPOConfig(environments=30)
    with pytest.raises(ValidationError, match="minibatches 9 exceed the 8 episodes"):
        GRPOConfig(environments=8, minibatches=9)
    with pytest.raises(ValidationError, match="vectorization"):
        GRPOConfig(vectorization="auto")
    with pytest.raises(ValidationError, match=r"clip_low is 0\.1, but loss_type cispo does not read it"):
        GRPOConfig(loss_type="cispo", clip_low=0.1)
