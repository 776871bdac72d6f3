"""Policies with a memory: what is remembered and forgotten, values at ends, and a task that needs a memory."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_environments import (
    Counting,
    Identity,
    resetting_on_the_next_step,
    same_records,
    same_weights,
    unbroken_and_resumed,
)

from taurl.control.algorithms.ppo import PPO, flat, sequences
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.playing import episode
from taurl.control.policies import Policy
from taurl.control.recurrent import RecurrentCritic, Sequences

SMALL = {
    "environments": 4,
    "rollout_steps": 16,
    "minibatch_size": 32,
    "epochs": 2,
    "record_every": 64,
    "memory": 8,
    "video": False,
}
QUIET = {**SMALL, "eval_episodes": 0}


class Cue(gymnasium.Env):
    """Shows a cue of −1 or 1, then `length` times noise; the last action is rewarded if it names the cue."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 5):
        self.length = length

    def _shown(self):
        cue = 2 * self.cue - 1 if self.steps == 0 else self.np_random.choice([-1, 1])
        return np.array([cue, self.steps == self.length], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.steps = int(self.np_random.integers(2)), 0
        return self._shown(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps > self.length
        return self._shown(), (1.0 if action == self.cue else -1.0) if over else 0.0, over, False, {}


def trainer_of(folder, env=Counting, **settings):
    return PPO(env, PPOConfig(out=folder / "run", **{**QUIET, **settings}))


def by_hand(network, observations, starts, state):
    """Outputs [T, B, ..], a copy after the other and an observation after the other."""
    columns = []
    for copy in range(starts.shape[1]):
        own, column = state[:, [copy]], []
        for t in range(len(starts)):
            own = torch.zeros_like(own) if starts[t, copy] else own
            output, own = network.step(observations[t, [copy]], own)
            column.append(output)
        columns.append(torch.cat(column))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sequences_give_what_steps_give(seed, share):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    critic = RecurrentCritic(3, (5,), 4, "tanh")
    observations, state = torch.randn(9, 3, 3, generator=generator), torch.randn(2, 3, 4, generator=generator)
    starts = torch.rand(9, 3, generator=generator) < share
    with torch.no_grad():
        found = critic(Sequences(observations, starts, state, state)).unflatten(0, (9, 3))
        torch.testing.assert_close(found, by_hand(critic, observations, starts, state))


def test_its_weights_begin_as_the_reference_codes_do():
    torch.manual_seed(0)
    critic = RecurrentCritic(4, (16,), 8, "tanh")
    for name, parameter in critic.lstm.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        else:
            torch.testing.assert_close(parameter.T @ parameter, torch.eye(parameter.shape[1]))


def test_the_gradient_of_a_sequence_is_that_of_its_steps():
    torch.manual_seed(0)
    critic = RecurrentCritic(3, (5,), 4, "tanh").double()
    observations, state = torch.randn(6, 2, 3).double(), torch.randn(2, 2, 4).double()
    starts = torch.tensor([[False, True], [False, False], [True, False], [False, False], [False, True], [False, False]])
    slopes = torch.randn(6, 2).double()
    own = state
    expected = 0.0
    for t in range(6):
        values, own = critic.step(observations[t], torch.where(starts[t][:, None], 0.0, own))
        expected = expected + (values * slopes[t]).sum()
    wanted = torch.autograd.grad(expected, list(critic.parameters()))
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # to be replaced, not added to
    _, pullback = critic.with_pullback()(Sequences(observations, starts, state, state))
    pullback(slopes.flatten().numpy())
    for parameter, theirs in zip(critic.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)


@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_values_remember_their_own_episode_and_no_other(mode, tmp_path, monkeypatch):
    if mode == "next_step":
        resetting_on_the_next_step(monkeypatch)
    trainer = trainer_of(tmp_path, environments=2, rollout_steps=7, minibatch_size=7)
    critic = trainer.critic

    @torch.no_grad()
    def value_after(episode, step):
        """V of an observation of `Counting` after all that its episode showed before."""
        state = critic.no_state(1)
        for seen in range(int(step) + 1):
            value, state = critic.step(torch.tensor([[float(episode), float(seen)]]), state)
        return value

    ends = 0
    for _ in range(4):  # episodes go on from one rollout to the next
        rollout = trainer.collector.collect(trainer.policy.actor, critic, 7)
        ends += int((rollout.terminated | rollout.truncated)[rollout.valid].sum())
        for t, copy in rollout.valid.nonzero().tolist():
            episode, step = rollout.observations[t, copy]
            torch.testing.assert_close(rollout.values[[t], copy], value_after(episode, step))
            torch.testing.assert_close(rollout.next_values[[t], copy], value_after(episode, step + 1))
    assert ends > 8


def test_minibatches_are_whole_environments_and_their_first_ratio_is_one(tmp_path):
    trainer = trainer_of(tmp_path)
    actor = trainer.policy.actor
    for _ in range(2):  # the second begins within episodes
        rollout = trainer.collector.collect(actor, trainer.critic, 16)
    assert rollout.actor_state.any()
    assert rollout.starts.any()
    seen = []
    for batch in sequences(flat(rollout, rollout.rewards, rollout.values), 32):
        with torch.no_grad():
            logprobs = trainer.policy.distribution.logprobs(actor(batch.observations), batch.actions)
            values = trainer.critic(batch.observations)
        torch.testing.assert_close(logprobs, batch.logprobs, atol=1e-6, rtol=0)
        torch.testing.assert_close(values, batch.values, atol=1e-5, rtol=0)
        rewards = batch.actions + 10 * batch.observations.observations.flatten(0, 1)[:, 1]  # which stand for advantages
        torch.testing.assert_close(batch.advantages, rewards, check_dtype=False)
        seen += batch.observations.actor_state.unbind(1)
    assert len(seen) == 4
    assert sorted(one.sum().item() for one in seen) == sorted(rollout.actor_state.sum((0, 2)).tolist())


def test_what_comes_before_an_episode_and_after_a_step_does_not_matter(tmp_path):
    trainer = trainer_of(tmp_path)
    rollout = trainer.collector.collect(trainer.policy.actor, trainer.critic, 16)
    with torch.no_grad():
        found = trainer.critic(rollout.sequences()).unflatten(0, (16, 4))
        begins = int(rollout.starts[1:, 0].nonzero()[0]) + 1
        moved = rollout.observations.clone()
        moved[begins - 1, 0] += 1.0
        other = trainer.critic(dataclasses.replace(rollout, observations=moved).sequences()).unflatten(0, (16, 4))
    changed = (found != other).nonzero()
    assert changed.tolist() == [[begins - 1, 0]]


CUE = {
    "environments": 8, "rollout_steps": 48, "minibatch_size": 192, "epochs": 6, "learning_rate": 5e-3,
    "discount": 1.0, "hidden": (16,), "record_every": 4000, "eval_episodes": 200,
}  # fmt: skip


@pytest.mark.slow
def test_a_task_that_needs_a_memory(tmp_path):
    """The recurrent policy solves it; the best that can be had without is a guess."""
    scores = {}
    for memory, steps in ((16, 24_000), (0, 4_800)):
        config = PPOConfig(out=tmp_path / str(memory), memory=memory, steps=steps, entropy_coefficient=0.01, **CUE)
        trainer = PPO(Cue, config).train()
        scores[memory] = trainer.run.records()[-1]["eval/mean_reward"]
    assert scores[16] > 0.9
    assert abs(scores[0]) < 0.3


RESUMED = {**SMALL, "steps": 1024, "save_every": 256, "eval_every": 256, "eval_episodes": 3}


@pytest.mark.parametrize("environment", ["CartPole-v1", Counting], ids=["native", "own"])
def test_a_resumed_run_with_a_memory_is_an_unbroken_one(environment, tmp_path):
    whole, resumed = unbroken_and_resumed(PPO, PPOConfig, tmp_path, env=environment, stop_after=700, **RESUMED)
    assert same_records(whole, resumed)
    assert same_weights(whole, resumed)
    assert torch.equal(whole.collector.actor_state, resumed.collector.actor_state)
    assert whole.collector.critic_state.any()


def test_a_saved_policy_remembers_and_forgets(tmp_path):
    trainer = trainer_of(tmp_path, Identity, steps=256).train()
    policy = Policy.load(tmp_path / "run")
    actor, shown = policy.actor, torch.eye(3)
    state = actor.no_state(1)
    for digit in (0, 2, 1):
        with torch.no_grad():
            parameters, state = actor.step(shown[[digit]], state)
        assert policy.predict(digit, episode_start=digit == 0) == int(parameters.argmax())
        torch.testing.assert_close(policy.state, state)
    policy.predict(0, episode_start=True)
    torch.testing.assert_close(policy.state, actor.step(shown[[0]], actor.no_state(1))[1].detach())
    assert trainer.predict(0, episode_start=True) == policy.predict(0, episode_start=True)


def test_evaluation_forgets_at_each_episode_and_leaves_the_policy_alone(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, lambda: Counting(2))  # episodes of 4, then 2 steps
    policy = trainer.policy
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter.mul_(3)
    policy.predict(np.zeros(2, np.float32))
    before, found = policy.state, []
    for _ in range(2):
        found.append(trainer.evaluate(20))  # 2 of each of 10 copies
        resetting_on_the_next_step(monkeypatch)
    assert policy.state is before
    assert sorted(found[0].returns) == sorted(found[1].returns)
    environment, returns = Counting(2), []
    for _ in range(2):
        observation, _ = environment.reset()
        total, over, first = 0.0, False, True
        while not over:
            action = policy.predict(observation, episode_start=first)
            observation, reward, terminated, truncated, _ = environment.step(int(action))
            total, over, first = total + reward, terminated or truncated, False
        returns.append(total)
    assert sorted(found[0].returns) == sorted(returns * 10)


def test_watching_leaves_the_policy_alone(tmp_path):
    policy = trainer_of(tmp_path, "CartPole-v1").policy
    policy.predict(np.ones(4, np.float32))
    before = policy.state
    environment = gymnasium.make("CartPole-v1")
    *_, returned = episode(policy, environment, seed=0, sampled=False)
    assert returned > 0
    assert policy.state is before


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="minibatch_size 40 is no multiple of rollout_steps 16; with memory"):
        PPOConfig(**{**SMALL, "minibatch_size": 40})
