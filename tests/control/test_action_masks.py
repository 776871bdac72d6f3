"""Action masks: a distribution by hand, where they come from, and that nothing forbidden is ever done."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_environments import Showing, resetting_on_the_next_step, same_records, same_weights, unbroken_and_resumed

from taurl.control import load
from taurl.control.algorithms.ppo import PPO, Clips, flat
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.distributions import FORBIDDEN, distribution_for, masked_logits
from taurl.control.environments import Environments
from taurl.control.networks import both_with_pullback
from taurl.control.playing import play
from taurl.runtime.errors import InputError, RunError

SMALL = {"environments": 3, "rollout_steps": 32, "minibatch_size": 48, "epochs": 3, "record_every": 96, "video": False}
QUIET = {**SMALL, "eval_episodes": 0, "mask_actions": True}


class Guarded(gymnasium.Env):
    """Shows which of 2 × 3 actions are allowed, and fails when another one is taken. At its end nothing is allowed."""

    observation_space = spaces.Box(0, 1, (5,), np.float32)
    action_space = spaces.MultiDiscrete([2, 3])

    def __init__(self, *, by_info: bool = True, as_tuple: bool = False):
        self.by_info, self.as_tuple = by_info, as_tuple

    def action_masks(self):
        return (self.allowed[:2], self.allowed[2:]) if self.as_tuple else self.allowed

    def _given(self, over=False):
        self.allowed = np.zeros(5, np.int8)
        if not over:
            for first, last in ((0, 2), (2, 5)):
                while not self.allowed[first:last].any():
                    self.allowed[first:last] = self.np_random.integers(2, size=last - first)
        return self.allowed.astype(np.float32), {"action_mask": self.action_masks()} if self.by_info else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._given()

    def step(self, action):
        if not (self.allowed[action[0]] and self.allowed[2 + action[1]]):
            raise AssertionError("took a forbidden action")
        self.steps += 1
        shown, info = self._given(over=self.steps == 5)
        return shown, float(action[1]), self.steps == 5, False, info


WAYS = {
    "info": Guarded,
    "info, tuple": lambda: Guarded(as_tuple=True),
    "method": lambda: Guarded(by_info=False),
    "method, tuple": lambda: Guarded(by_info=False, as_tuple=True),
}


def trainer_of(folder, env, **settings):
    return PPO(env, PPOConfig(out=folder / "run", **{**QUIET, **settings}))


def test_a_distribution_by_hand():
    distribution = distribution_for(spaces.Discrete(4))
    logits = torch.tensor([[math.log(1), math.log(5), math.log(3), 50.0]], requires_grad=True)
    masked = masked_logits(logits, torch.tensor([[True, False, True, False]]))
    probabilities = [distribution.logprobs(masked, torch.tensor([a])).exp().item() for a in range(4)]
    assert probabilities == [pytest.approx(0.25), 0.0, pytest.approx(0.75), 0.0]
    entropy = distribution.entropy(masked)
    assert entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    other = masked_logits(torch.zeros(1, 4), torch.tensor([[True, False, True, False]]))
    divergence = distribution.kl(masked, other)
    assert divergence.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    torch.manual_seed(0)
    assert set(distribution.sample(masked.detach().expand(1000, -1).numpy()).tolist()) == {0, 2}
    assert distribution.mode(masked.detach().numpy()).tolist() == [2]
    for figure in (entropy, divergence, distribution.logprobs(masked, torch.tensor([0]))):
        (gradient,) = torch.autograd.grad(figure.sum(), logits, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient[0, 1] == gradient[0, 3] == 0.0
        assert gradient[0, 0] != 0.0
    # log π(0) = log softmax over what is allowed: its slope is 1 − 0.25, and −0.75 in the other one.
    torch.testing.assert_close(gradient, torch.tensor([[0.75, 0.0, -0.75, 0.0]]))


@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 3])], ids=["discrete", "multi"])
def test_an_update_leaves_forbidden_logits_alone(space):
    distribution = distribution_for(space)
    torch.manual_seed(0)
    allowed = torch.tensor([[True, False, True, False, True]]).expand(4, -1)
    parameters = masked_logits(torch.randn(4, 5), allowed).numpy()
    logprobs, pullback = distribution.with_pullback(parameters, distribution.sample(parameters))
    gradient = torch.from_numpy(pullback(torch.randn(4).numpy(), torch.randn(4).numpy()))
    assert np.isfinite(logprobs).all()
    assert gradient.isfinite().all()
    assert (gradient[~allowed] == 0).all()
    assert (gradient[:, 2] != 0).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_nothing_forbidden_is_done(way, mode, tmp_path, monkeypatch):
    if mode == "next_step":
        resetting_on_the_next_step(monkeypatch)
    trainer = trainer_of(tmp_path, WAYS[way], steps=960, learning_rate=1e-2).train()
    # The best third action that is allowed: 2, 1, 0 with 4/7, 2/7 and 1/7, over 5 steps.
    assert trainer.evaluate(100).metrics()["eval/mean_reward"] > 5 * (4 / 7 * 2 + 2 / 7) - 1
    trainer.evaluate(10, deterministic=False)
    policy = load(tmp_path / "run")
    assert policy.predict(np.zeros(5), action_mask=[1, 0, 0, 1, 0]).tolist() == [0, 1]
    assert trainer.predict(np.zeros(5), action_mask=([0, 1], [0, 0, 1])).tolist() == [1, 2]


@pytest.mark.slow
def test_taxi_never_does_what_it_forbids(tmp_path):
    trainer = trainer_of(tmp_path, "Taxi-v4", steps=2000)
    base, taken, forbidden = trainer.environments.vector.step, [], []

    def step(actions):
        masks = trainer.environments.action_masks
        taken.extend(actions.tolist())
        forbidden.extend(actions[~masks[np.arange(len(actions)), actions]].tolist())
        for copy, one in enumerate(trainer.environments.vector.envs):
            np.testing.assert_array_equal(masks[copy], one.unwrapped.action_mask(one.unwrapped.s))
        return base(actions)

    trainer.environments.vector.step = step
    trainer.train()
    assert set(taken) == set(range(6))
    assert forbidden == []


def test_the_mask_that_was_acted_on_is_the_one_that_is_learned_with(tmp_path):
    trainer = trainer_of(tmp_path, Guarded)
    rollout = trainer.collector.collect(trainer.policy.actor, trainer.critic, 32)
    assert torch.equal(rollout.action_masks, rollout.observations > 0)
    logits = trainer.policy.actor(rollout.observations)
    assert (rollout.parameters[~rollout.action_masks] == FORBIDDEN).all()
    allowed = rollout.action_masks
    torch.testing.assert_close(rollout.parameters[allowed], logits[allowed].detach(), atol=1e-6, rtol=0)
    batch = trainer._prepared([flat(rollout, rollout.rewards, rollout.values)])[0]
    networks = both_with_pullback(trainer.policy.actor, trainer.critic)
    figures = trainer._descend(networks, batch, 1e-3, Clips(0.2, None), measured=True)[1]
    assert float(figures["train/approx_kl"]) < 1e-10


@pytest.mark.parametrize("more", [{}, {"memory": 4, "kl_penalty_target": 0.01}], ids=["masks", "memory and price too"])
def test_a_resumed_run_with_masks_is_an_unbroken_one(more, tmp_path):
    settings = {**SMALL, "mask_actions": True, "steps": 768, "save_every": 192, "minibatch_size": 64, **more}
    whole, resumed = unbroken_and_resumed(PPO, PPOConfig, tmp_path, env=Guarded, stop_after=500, **settings)
    assert same_records(whole, resumed)
    assert same_weights(whole, resumed)
    if more:
        assert 0 < whole.run.records()[0]["train/kl"] < 0.1


def test_a_video_of_a_masked_policy(tmp_path):
    trainer = trainer_of(tmp_path, "Taxi-v4", steps=96).train()
    short = {"max_episode_steps": 40}
    found = play(trainer.policy, "Taxi-v4", short, video=tmp_path / "taxi.gif", episodes=1, seed=0, sampled=True)
    assert -40 <= found.returns[0] <= 20  # and not −400: no forbidden pick-up or drop-off, at −10 each


def test_a_mask_that_forbids_everything_is_refused():
    class Stuck(Guarded):
        def _given(self, over=False):
            shown, info = super()._given(over)
            self.allowed[2:] = 0 if self.steps == 3 else self.allowed[2:]
            return shown, info

    environments = Environments(Stuck, 2, seed=0, mask_actions=True)
    environments.reset()

    def step():
        masks = environments.action_masks
        environments.step(np.stack([masks[:, :2].argmax(1), masks[:, 2:].argmax(1)], 1))

    step()
    step()
    with pytest.raises(
        RunError, match=r"Stuck: the action mask of copy 0 allows nothing at step 3: \[\d, \d, 0, 0, 0\]"
    ):
        step()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v1", r"CartPole-v1: mask_actions is on, but it gives no info\['action_mask'\] and has no method"),
        ("Acrobot-v1", r"Acrobot-v1: mask_actions is on, but it gives no info\['action_mask'\] and has no method"),
        ("Pendulum-v1", r"Pendulum-v1: mask_actions is on, but the action space Box.* is neither Discrete nor"),
    ],
)
def test_environments_without_masks_are_refused(env, message):
    with pytest.raises(InputError, match=message):
        Environments(env, 2, seed=0, mask_actions=True).reset()
    with pytest.raises(InputError, match=message):  # from 4 copies on it may be a vector class of its own
        Environments(env, 4, seed=0, mask_actions=True).reset()


def test_masks_are_asked_for_once_a_step_and_what_fails_within_is_not_called_absent():
    class Counted(Showing):
        asked = 0

        def action_masks(self):
            Counted.asked += 1
            return np.ones(2, dtype=bool) if Counted.asked < 3 else self.no_such_thing

    environments = Environments(lambda: Counted(spaces.Box(0, 1, (1,))), 1, seed=0, mask_actions=True)
    environments.reset()
    environments.step(np.zeros(1, dtype=int))
    assert Counted.asked == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        environments.step(np.zeros(1, dtype=int))


def test_a_mask_of_another_width_is_refused():
    class Narrow(Guarded):
        action_space = spaces.MultiDiscrete([2, 4])

    with pytest.raises(InputError, match="Narrow: an action mask has 5 entries, expected 6"):
        Environments(Narrow, 2, seed=0, mask_actions=True).reset()


def test_a_policy_trained_with_masks_wants_one(tmp_path):
    policy = trainer_of(tmp_path, Guarded).policy
    with pytest.raises(InputError, match="trained with action masks, but is given none"):
        policy.predict(np.zeros(5))
