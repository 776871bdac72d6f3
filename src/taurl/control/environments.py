"""Several copies of an environment stepped together, with what gymnasium's autoreset modes do made explicit.

A vector environment resets a copy whose episode ended either on its own next step, which ignores the action and only
resets (NEXT_STEP, the mode of vector-native classes), or in the same step, which then returns the first observation of
the next episode and puts the last one aside (SAME_STEP). Here both give the same: what followed each action, and
whether it was an action at all.
"""

import copy
import json
import sys
import sysconfig
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from taurl.control.action_masks import ActionMasks
from taurl.control.environment_states import NoState, restore, state_text
from taurl.control.making import EnvironmentLike, learning_view, make_vector
from taurl.runtime.errors import InputError, RunError, one_line

Array = np.ndarray[Any, Any]
EPISODES_IN_MEAN = 100  # of the running means, as in Stable-Baselines3

# Of `Environments`, between its steps.
UNDER_WAY = ("_observations", "fresh", "ended", "_returns", "_lengths", "episode_starts", "action_masks")


class Transition(NamedTuple):
    """What one step of all B copies gave.

    observations: what to act on next (batched as the space batches them).
    rewards: float [B], as the environment gives them.
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

    A checkpoint holds where they stand (`environment_states`). Those whose state cannot be had begin their episodes
    anew after it, in the run that wrote it as in the one that is resumed from it, so that both go on alike.

    Args:
        environment: a gymnasium id, a function that makes one, or an environment (then B is 1).
        count: B.
        seed: copy i is reset with seed + i the first time.
        arguments: of a gymnasium id.
        vectorization: see `EnvironmentSettings`.
        mask_actions: whether the environments are asked which actions they allow.
        for_learning: whether transitions are as learning is shown them (`atari.LearningView`); episodes never are.
    Attributes:
        episode_starts: bool [B], whether what is acted on next is the first observation of an episode.
        action_masks: bool [B, n], what may be done next (`action_masks`); None unless `mask_actions`.
        fresh: whether nothing was done since the reset.
        unsaved: why the last checkpoint could not hold where they stand; None if it could.
    Raises: InputError when there is no such environment or it cannot be made.
    """

    # A failure within a step is no reason to save nothing: the copies then begin anew, see `tensors`.
    changes = 0

    def __init__(
        self,
        environment: EnvironmentLike,
        count: int,
        *,
        seed: int,
        arguments: dict[str, Any] | None = None,
        vectorization: str = "auto",
        mask_actions: bool = False,
        for_learning: bool = False,
    ):
        self.name = environment if isinstance(environment, str) else getattr(environment, "__name__", "environment")
        self.vector = make_vector(environment, count, arguments or {}, vectorization)
        self._made = not isinstance(environment, gymnasium.Env)
        self.view = learning_view(environment, arguments or {}) if for_learning else None
        self.count, self.seed = self.vector.num_envs, seed
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        mode = self.vector.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise InputError(f"{self.name}: its autoreset mode is {mode}, expected NEXT_STEP or SAME_STEP")
        self.resets_in_same_step = mode == AutoresetMode.SAME_STEP
        self.ended, self.episode_starts = np.zeros(self.count, dtype=bool), np.ones(self.count, dtype=bool)
        self.action_masks: Array | None = None
        self._masks = ActionMasks(self.name, self.action_space) if mask_actions else None
        self.episodes: list[Episode] = []  # finished since last taken
        self.recent: deque[Episode] = deque(maxlen=EPISODES_IN_MEAN)
        self.fresh = True
        self.unsaved: str | None = None
        self._observations: Any = None
        self._returns, self._lengths = np.zeros(self.count), np.zeros(self.count, dtype=np.int64)
        self._bounds = bounds(self.action_space)
        self._copies = isinstance(self.vector, SyncVectorEnv | AsyncVectorEnv)  # what they give is nobody else's
        self._steps = self._recorded = 0  # in all, and up to the last record

    @property
    def observations(self) -> Any:
        """What to act on next; begins episodes where none are under way."""
        return self.reset() if self._observations is None else self._observations

    def reset(self, seeds: Sequence[int] | None = None) -> Any:
        """Begin an episode in every copy; returns the observations.

        Args:
            seeds: of each copy; by default from `seed` and the steps taken, so that no two resets are alike.
        """
        self.ended = np.zeros(self.count, dtype=bool)
        self._returns[:], self._lengths[:] = 0, 0
        given: Any = self.seed if seeds is None else list(seeds)  # gymnasium declares no list, and takes one
        if seeds is None and self._steps:
            given = int(np.random.SeedSequence([self.seed, self._steps]).generate_state(1)[0])
        try:
            with torch.enable_grad():
                observations, infos = self.vector.reset(seed=given)
        except Exception as error:
            raise self._failed("reset", error) from error
        self._observations = self._own(observations)
        self.episode_starts = np.ones(self.count, dtype=bool)
        if self.view is not None:
            self.view.begin(infos)
        self._check("observation", self.observation_space, self._observations, range(self.count))
        self._read_masks(infos)
        self.fresh = True
        return self._observations

    def _failed(self, where: str, error: Exception) -> RunError:
        """What to raise when the environment itself, or gymnasium over what it gave, fails."""
        return RunError(
            f"{self.name}: {where} failed with {type(error).__name__}: {one_line(error)}{_place(error)}; mend the "
            "environment (gymnasium.utils.env_checker.check_env finds many faults)"
        )

    def _own(self, observations: Any) -> Any:
        if self._copies:
            return observations
        return observations.copy() if isinstance(observations, np.ndarray) else copy.deepcopy(observations)

    def begin_anew(self) -> None:
        """Let go of the episodes under way: others begin before the next step."""
        self._observations = None

    def step(self, actions: Array) -> Transition:
        """Act in every copy. Actions of a box are clipped to it; what was passed is not changed.

        Raises: RunError that names copy and step for a reward or an observation that is not finite.
        """
        if self._bounds is not None:
            actions = np.clip(actions, *self._bounds)
        self._steps += 1  # before it is known to succeed: some copies may have moved on when it fails
        try:
            with torch.enable_grad():  # as wherever else it runs: it may differentiate something of its own
                observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        except Exception as error:
            raise self._failed(f"step {self._steps} of {self.count} copies", error) from error
        if not self._copies:  # a vector class may go on in the same memory
            observations, rewards = self._own(observations), rewards.copy()
            terminated, truncated = terminated.copy(), truncated.copy()
        self._observations, self.fresh = observations, False
        only_reset, done = self.ended, terminated | truncated
        self._check("reward", None, rewards, range(self.count))
        self._check("observation", self.observation_space, observations, range(self.count))
        self._count(rewards, done, only_reset)
        last: dict[int, Any] = {}
        self.episode_starts = done if self.resets_in_same_step else only_reset
        if not self.resets_in_same_step:
            self.ended = done
        elif done.any():
            for place in map(int, np.flatnonzero(done)):
                last[place] = self._own(infos["final_obs"][place])
                self._check("observation", self.observation_space, batched(last[place]), [place])
        self._read_masks(infos)
        transition = Transition(observations, rewards, terminated, truncated, only_reset, last)
        return transition if self.view is None else self.view(transition, infos)

    def _read_masks(self, infos: dict[str, Any]) -> None:
        if self._masks:
            self.action_masks = self._masks.read(self.vector, infos, self.ended, self._steps)

    def take_episodes(self) -> list[Episode]:
        """The episodes that have finished since the last call."""
        taken, self.episodes = self.episodes, []
        self._recorded = self._steps
        return taken

    def close(self) -> None:
        """Close the copies that were made here; an environment that was given as an object stays open.

        What fails then hides no error for which a run closes them.
        """
        failing = sys.exc_info()[0] is not None
        if self._made:
            with suppress(Exception) if failing else nullcontext():
                self.vector.close()

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint: the last episodes, and where the copies stand if that can be had.

        Between episodes too, for what a copy keeps from one to the next.
        """
        state, self.unsaved = None, None
        if self._steps or self._observations is not None:
            try:
                if self._steps != self._recorded:
                    raise NoState("a step that failed has moved it on")
                state = state_text(self.vector, [getattr(self, name) for name in UNDER_WAY])
            except NoState as error:
                self.unsaved = str(error)
                self.begin_anew()
        facts = {"steps": self._steps, "recent": list(self.recent), "state": state, "unsaved": self.unsaved}
        return {"facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        facts = json.loads(tensors["facts"].numpy().tobytes())
        self._steps = self._recorded = facts["steps"]
        self.recent.clear()
        self.recent.extend(Episode(*one) for one in facts["recent"])
        self.unsaved = facts["unsaved"]
        if facts["state"] is None:
            self.begin_anew()
            return
        try:
            found = restore(facts["state"], self.vector)
        except NoState as error:
            self.unsaved = f"what this checkpoint holds does not fit: {error}"
            self.begin_anew()
            return
        for name, value in zip(UNDER_WAY, found, strict=True):
            setattr(self, name, value)

    def _count(self, rewards: Array, done: Array, only_reset: Array) -> None:
        self._returns += rewards
        self._lengths += ~only_reset
        if done.any():
            for place in np.flatnonzero(done):
                episode = Episode(float(self._returns[place]), int(self._lengths[place]))
                self.episodes.append(episode)
                self.recent.append(episode)
            self._returns[done], self._lengths[done] = 0, 0

    def _check(self, what: str, space: gymnasium.Space[Any] | None, values: Any, copies: Sequence[int]) -> None:
        """Refuse numbers that are not finite; by their sum first, since this is asked at every step."""
        match space:
            case spaces.Dict():
                for name, part in space.spaces.items():
                    self._check(f"{what} {name!r}", part, values[name], copies)
            case spaces.Tuple():
                for place, part in enumerate(space.spaces):
                    self._check(f"{what} [{place}]", part, values[place], copies)
            case spaces.Discrete() | spaces.MultiDiscrete():
                past = space.start + (space.n if isinstance(space, spaces.Discrete) else space.nvec)
                wrong = (values < space.start) | (values >= past)
                if wrong.any():
                    self._report(what, values, copies, wrong, f"from {space.start} to {past - 1}")
            case spaces.Box() | None:
                if values.dtype.kind == "f" and not np.isfinite(values.sum()):
                    self._report(what, values, copies, ~np.isfinite(values), "finite numbers")

    def _report(self, what: str, values: Array, copies: Sequence[int], wrong: Array, expected: str) -> None:
        rows = wrong.reshape(len(values), -1).any(1)
        if rows.any():  # a sum may overflow where no value is wrong
            row = int(np.flatnonzero(rows)[0])
            raise RunError(
                f"{self.name}: copy {copies[row]} gave the {what} {values[row]} at step {self._steps} of each copy, "
                f"expected {expected}; mend the environment"
            )


class SingleEpisodes(Environments):
    """Copies that play one episode each, and wait for the longest: what a copy is stepped beyond is no transition.

    Episodes begin with `reset`, so a checkpoint holds none under way.
    """

    def reset(self, seeds: Sequence[int] | None = None) -> Any:
        self.finished = np.zeros(self.count, dtype=bool)
        return super().reset(seeds)

    def step(self, actions: Array) -> Transition:
        finished = self.finished
        given = super().step(actions)
        playing = ~finished
        terminated, truncated = given.terminated & playing, given.truncated & playing
        self.finished = finished | terminated | truncated
        last = {place: seen for place, seen in given.last_observations.items() if playing[place]}
        rewards, only_reset = np.where(playing, given.rewards, 0.0), given.only_reset | finished
        return Transition(given.observations, rewards, terminated, truncated, only_reset, last)

    def cut(self) -> Array:
        """Count the episodes that still go on as finished. Returns: which they were, bool [B]."""
        cut = ~self.finished
        everywhere = np.ones(self.count, dtype=bool)
        self._count(np.zeros(self.count), done=everywhere, only_reset=everywhere)
        self.finished = everywhere
        return cut

    def tensors(self) -> dict[str, Tensor]:
        self.begin_anew()
        return super().tensors()

    def _count(self, rewards: Array, done: Array, only_reset: Array) -> None:
        playing = ~self.finished
        super()._count(rewards * playing, done & playing, only_reset | self.finished)


def _place(error: Exception) -> str:
    """Where in somebody's own code an error was raised, in words; nothing where none of it is known."""
    others = (
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(__file__).parents[1]),
        "<",
    )
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(others)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def batched(observation: object) -> object:
    """One observation as a batch of one, as its space batches them."""
    if isinstance(observation, dict):
        return {name: batched(part) for name, part in observation.items()}
    if isinstance(observation, tuple):
        return tuple(batched(part) for part in observation)
    return np.asarray(observation)[None]


def bounds(space: gymnasium.Space[Any]) -> tuple[Array, Array] | None:
    """Lowest and highest action of a box; None for other spaces."""
    return (space.low, space.high) if isinstance(space, spaces.Box) else None
