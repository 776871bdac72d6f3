"""Several copies of an environment stepped together, with what gymnasium's autoreset modes do made explicit.

A vector environment resets a copy whose episode ended either on its own next step, which ignores the action and only
resets (NEXT_STEP, the mode of vector-native classes), or in the same step, which then returns the first observation of
the next episode and puts the last one aside (SAME_STEP). Here both give the same: what followed each action, and
whether it was an action at all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from taurl.runtime.errors import InputError, RunError

Array = np.ndarray[Any, Any]
EnvironmentLike = str | Callable[[], gymnasium.Env[Any, Any]] | gymnasium.Env[Any, Any]


class Transition(NamedTuple):
    """What one step of all B copies gave.

    observations: what to act on next (batched as the space batches them).
    rewards: float64 [B].
    terminated, truncated: bool [B].
    only_reset: bool [B], copies whose step ignored the action and reset: no transition at all.
    last_observations: for copies whose episode ended and which have reset already, what they ended with, by copy.
    """

    observations: Any
    rewards: Array
    terminated: Array
    truncated: Array
    only_reset: Array
    last_observations: dict[int, Any]


class Episode(NamedTuple):
    """A finished episode: its undiscounted return, and its length in steps."""

    reward: float
    length: int


class Environments:
    """B copies of one environment.

    Args:
        environment: a gymnasium id, a function that makes one, or an environment (then B is 1).
        count: B.
        seed: copy i is reset with seed + i the first time.
        arguments: of a gymnasium id.
        vectorization: see `EnvironmentSettings`.
    Raises: InputError when there is no such environment or it cannot be made.
    """

    def __init__(
        self,
        environment: EnvironmentLike,
        count: int,
        *,
        seed: int,
        arguments: dict[str, Any] | None = None,
        vectorization: str = "auto",
    ):
        self.name = environment if isinstance(environment, str) else getattr(environment, "__name__", "environment")
        self.vector = make_vector(environment, count, arguments or {}, vectorization)
        self.count, self.seed = self.vector.num_envs, seed
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        mode = self.vector.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise InputError(f"{self.name}: its autoreset mode is {mode}, expected NEXT_STEP or SAME_STEP")
        self.resets_in_same_step = mode == AutoresetMode.SAME_STEP
        self.ended = np.zeros(self.count, dtype=bool)
        self.episodes: list[Episode] = []  # finished since last taken
        self._returns, self._lengths = np.zeros(self.count), np.zeros(self.count, dtype=np.int64)
        self._bounds = bounds(self.action_space)
        self._steps = 0

    def reset(self) -> Any:
        """Begin an episode in every copy; returns the observations."""
        self.ended[:] = False
        self._returns[:], self._lengths[:] = 0, 0
        return self.vector.reset(seed=self.seed)[0]

    def step(self, actions: Array) -> Transition:
        """Act in every copy. Actions of a box are clipped to it; what was passed is not changed.

        Raises: RunError that names copy and step for a reward or an observation that is not finite.
        """
        if self._bounds is not None:
            actions = np.clip(actions, *self._bounds)
        observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        self._steps += 1
        only_reset, done = self.ended, terminated | truncated
        self._check(rewards, observations)
        self._count(rewards, done, only_reset)
        last: dict[int, Any] = {}
        if self.resets_in_same_step:
            only_reset = np.zeros_like(done)
            for copy in np.flatnonzero(done):
                last[int(copy)] = infos["final_obs"][copy]
        self.ended = done if not self.resets_in_same_step else self.ended
        return Transition(observations, rewards, terminated, truncated, only_reset, last)

    def take_episodes(self) -> list[Episode]:
        """The episodes that have finished since the last call."""
        taken, self.episodes = self.episodes, []
        return taken

    def close(self) -> None:
        self.vector.close()

    def _count(self, rewards: Array, done: Array, only_reset: Array) -> None:
        self._returns += rewards
        self._lengths += ~only_reset
        if done.any():
            for copy in np.flatnonzero(done):
                self.episodes.append(Episode(float(self._returns[copy]), int(self._lengths[copy])))
            self._returns[done], self._lengths[done] = 0, 0

    def _check(self, rewards: Array, observations: Any) -> None:
        if not np.isfinite(rewards.sum()):
            self._report("reward", rewards)
        if isinstance(observations, np.ndarray) and observations.dtype.kind == "f" and np.isnan(observations.sum()):
            self._report("observation", observations)

    def _report(self, what: str, values: Array) -> None:
        rows = ~np.isfinite(values.reshape(len(values), -1)).all(1)
        if rows.any():  # a sum may overflow where no value is wrong
            copy = int(np.flatnonzero(rows)[0])
            raise RunError(
                f"{self.name}: copy {copy} gave the {what} {values[copy]} at step {self._steps}, expected finite "
                "numbers; mend the environment"
            )


def make_vector(
    environment: EnvironmentLike, count: int, arguments: dict[str, Any], vectorization: str
) -> VectorEnv[Any, Any, Any]:
    """The vector environment, vector-native where the environment has such a class and nothing else is asked for."""
    if isinstance(environment, gymnasium.Env):
        if count != 1:
            raise InputError(
                f"environments is {count}, but one environment object was given; give a function that makes one"
            )
        made: gymnasium.Env[Any, Any] = environment
        return synchronous([lambda: made])
    if callable(environment):
        makers = [environment] * count
        return asynchronous(makers) if vectorization == "async" else synchronous(makers)
    try:
        native = vectorization == "auto" and gymnasium.spec(environment).vector_entry_point is not None
        if native:
            return gymnasium.make_vec(environment, num_envs=count, **arguments)
        makers = [lambda: gymnasium.make(environment, **arguments)] * count
        return asynchronous(makers) if vectorization == "async" else synchronous(makers)
    except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"env is {environment!r}: cannot be made: {text}") from error


def synchronous(makers: list[Callable[[], gymnasium.Env[Any, Any]]]) -> VectorEnv[Any, Any, Any]:
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def asynchronous(makers: list[Callable[[], gymnasium.Env[Any, Any]]]) -> VectorEnv[Any, Any, Any]:
    return gymnasium.vector.AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def bounds(space: gymnasium.Space[Any]) -> tuple[Array, Array] | None:
    """Lowest and highest action of a box; None for other spaces."""
    return (space.low, space.high) if isinstance(space, spaces.Box) else None
