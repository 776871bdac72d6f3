"""Environments of a few lines for the tests of the control wing."""

import copy

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import taurl.control.making
from taurl.runtime.checkpoints import checkpoint_steps


class Counting(gymnasium.Env):
    """Shows (episode, step); episodes of 2, 3, 4, 2, … steps, of which every second one is cut and not ended.

    The reward is the action plus ten times the step that it was taken in.
    """

    observation_space = spaces.Box(0, 1000, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, first: int = 0):
        self.episode = first - 1

    def _shown(self):
        return np.array([self.episode, self.step_number], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self._shown(), {}

    def step(self, action):
        reward = float(action) + 10 * self.step_number
        self.step_number += 1
        over, cut = self.step_number == 2 + self.episode % 3, self.episode % 2 == 1
        return self._shown(), reward, over and not cut, over and cut, {}


class Identity(gymnasium.Env):
    """Rewards the action that is what was shown: 1 for the digit, or minus the distance for a box. A step each."""

    def __init__(self, action_space=None):
        self.action_space = action_space or spaces.Discrete(3)
        discrete = isinstance(self.action_space, spaces.Discrete)
        self.observation_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (1,), np.float32)

    def _show(self):
        discrete = isinstance(self.observation_space, spaces.Discrete)
        self.shown = self.np_random.integers(3) if discrete else self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.shown

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def step(self, action):
        discrete = isinstance(self.observation_space, spaces.Discrete)
        reward = float(action == self.shown) if discrete else -float(np.abs(action - self.shown).sum())
        self.steps += 1
        return self._show(), reward, False, self.steps == 8, {}


class Endless(gymnasium.Env):
    """A reward of 1 for ever, and always the same to see; a time limit of `limit` steps."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, limit: int = 5):
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.ones(1, np.float32), 1.0, False, self.steps == self.limit, {}


class Hidden(Identity):
    """`Identity` with something in it that cannot be saved."""

    def __init__(self):
        super().__init__()
        self.world = object()


class Broken(Counting):
    """`Counting` whose `what` is not a number from the `at`-th step on."""

    def __init__(self, what: str, at: int):
        super().__init__()
        self.what, self.at, self.taken = what, at, 0

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.taken += 1
        if self.taken >= self.at:
            reward = float("nan") if self.what == "reward" else reward
            observation = np.full_like(observation, np.inf) if self.what == "observation" else observation
        return observation, reward, terminated, truncated, info


class Showing(gymnasium.Env):
    """Shows a sample of whatever space, for 5 steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 5, False, {}


def resetting_on_the_next_step(monkeypatch):
    """From here on copies are reset on their own next step, as vector-native classes do."""

    def synchronous(makers):
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)

    monkeypatch.setattr(taurl.control.making, "synchronous", synchronous)


def advantages_by_hand(rollout, *, discount, trace_decay):
    """GAE of a rollout, [T, B], one number after the other."""
    found = [[0.0] * rollout.rewards.shape[1] for _ in rollout.rewards]
    for column in range(rollout.rewards.shape[1]):
        following = 0.0
        for t in reversed(range(len(found))):
            reward, value, next_value = (
                float(one[t, column]) for one in (rollout.rewards, rollout.values, rollout.next_values)
            )
            error = reward - value + (0.0 if rollout.terminated[t, column] else discount * next_value)
            goes_on = not (rollout.terminated[t, column] or rollout.truncated[t, column])
            following = error + (discount * trace_decay * following if goes_on else 0.0)
            found[t][column] = following
    return torch.tensor(found)


def same_records(one, other):
    """Whether two runs wrote the same metrics, times aside."""
    return without_times(one) == without_times(other)


def without_times(trainer):
    apart = ("time/", "seconds", "memory/")
    records = trainer.run.records()
    return [{name: value for name, value in record.items() if not name.startswith(apart)} for record in records]


def same_weights(one, other):
    pairs = zip(one.policy.actor.parameters(), other.policy.actor.parameters(), strict=True)
    return all(bool((mine == theirs).all()) for mine, theirs in pairs)


def unbroken_and_resumed(trainer_class, config_class, folder, *, stop_after, env=None, **settings):
    """A run in one piece, and one that was left after so many steps and goes on from its last checkpoint."""
    configs = [config_class(out=folder / name, **settings) for name in ("whole", "parts")]
    whole = trainer_class(env, configs[0]).train()
    left = trainer_class(env, configs[1])
    for record in left.steps():
        if record["step"] == max(saved(folder), default=0):
            kept = weights_of(left)
        # Not right after a checkpoint: some of it is to be done again.
        if record["step"] >= stop_after and max(saved(folder)) < record["step"]:
            break
    given = {} if env is None or isinstance(env, str) else {"env": env}
    resumed = trainer_class.resume(folder / "parts", **given)
    assert resumed.run.step == max(saved(folder)) < configs[1].steps
    found = weights_of(resumed)  # before it goes on: what acts and is saved now
    assert all(bool((found[name] == weight).all()) for name, weight in kept.items())
    return whole, resumed.train()


def weights_of(trainer):
    policy = trainer.policy
    return copy.deepcopy(policy.actor.state_dict() if hasattr(policy, "actor") else {"values": policy.values})


def saved(folder):
    return checkpoint_steps(folder / "parts" / "checkpoints")
