"""Evaluation: whole episodes, in environments of their own, with the normalisation frozen."""

from copy import copy as shallow_copy
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from taurl.control.environments import Environments
from taurl.control.making import is_atari, registered
from taurl.runtime.errors import InputError

COPIES, MOST_COPIES = 10, 100
EPISODES_A_COPY = 100  # where there are many: more copies cost less each, but take longer to make
LONGEST = 10_000  # steps of an episode of an environment that sets no limit: a greedy policy may walk in circles
LONGEST_OF_OTHERS = 100_000  # of one that is not named by an id, so that its limit is not known
PERCENTILES = (10, 50, 90)
EVALUATION_KEY = (1,)  # of the stream of seeds that evaluations have for themselves


def copies_for(episodes: int) -> int:
    """How many copies of an environment play so many episodes."""
    return min(episodes, max(COPIES, min(MOST_COPIES, episodes // EPISODES_A_COPY)))


def evaluation_seed(seed: int) -> int:
    """The seed of a run's evaluations: runs with neighbouring seeds are not evaluated on the same episodes, nor on
    those that they train on."""
    return int(np.random.SeedSequence(seed, spawn_key=EVALUATION_KEY).generate_state(1)[0])


def with_limit(environment: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The arguments of an environment, with a limit to its episodes if it is named by an id, has none and takes one;
    and the steps after which they are to be cut, None where the environment has a limit of its own."""
    if not isinstance(environment, str):
        return arguments, LONGEST_OF_OTHERS
    if (name := registered(environment)) not in gymnasium.registry:
        return arguments, None
    spec = gymnasium.spec(name)
    if spec.max_episode_steps is not None or is_atari(name) or "max_episode_steps" in arguments:
        return arguments, None
    if spec.vector_entry_point is not None:  # a class of its own, which need not know the argument
        return arguments, LONGEST
    return {"max_episode_steps": LONGEST, **arguments}, LONGEST


class Acting(Protocol):
    """What can be evaluated: anything that acts on a batch of observations.

    What says that it `remembers` is told `episode_starts` too, and what says that it `masks_actions` `action_masks`.
    """

    def act(self, batch: Any, *, deterministic: bool = True) -> Any: ...


class Evaluation(NamedTuple):
    """Undiscounted returns and lengths of the episodes; and how many of them the evaluation itself has cut."""

    returns: list[float]
    lengths: list[int]
    cut: int = 0

    def metrics(self) -> dict[str, float]:
        """Mean, standard deviation and percentiles of the return, and the mean length, by `eval/…` names."""
        found = {"eval/mean_reward": float(np.mean(self.returns)), "eval/std_reward": float(np.std(self.returns))}
        found |= {f"eval/reward_p{p}": float(np.percentile(self.returns, p)) for p in PERCENTILES}
        return found | {"eval/mean_ep_length": float(np.mean(self.lengths))}


def cut_short(found: Evaluation) -> str:
    """What to say where an evaluation, or who has watched, has cut episodes."""
    return (
        f"{found.cut} of {len(found.lengths)} episodes were cut after {max(found.lengths):,} steps: "
        "the environment sets no limit (max_episode_steps)"
    )


def require_episodes(episodes: int) -> None:
    """Raises: InputError for less than one episode."""
    if episodes < 1:
        raise InputError(f"episodes is {episodes}: expected at least one to play")


def evaluate(
    policy: Acting,
    environments: Environments,
    episodes: int,
    *,
    deterministic: bool = True,
    longest: int | None = None,
) -> Evaluation:
    """Play so many whole episodes.

    Every copy plays its share, and what it plays beyond is left out: taking the first to finish would favour short
    episodes.

    Args:
        longest: count an episode as over after so many steps; what follows counts as the next. None: no bound.
    Raises: InputError for less than one episode.
    """
    require_episodes(episodes)
    shares = np.full(environments.count, episodes // environments.count)
    shares[: episodes % environments.count] += 1
    returns, lengths = np.zeros(environments.count), np.zeros(environments.count, dtype=int)
    played: list[tuple[float, int]] = []
    acting: Any = shallow_copy(policy)  # what it remembers of these episodes stays there
    observations = environments.reset()
    while shares.any():
        told = what_to_tell(policy, environments.episode_starts, environments.action_masks)
        one = environments.step(acting.act(observations, deterministic=deterministic, **told))
        observations = one.observations
        returns += one.rewards
        lengths += ~one.only_reset
        done = one.terminated | one.truncated
        if longest is not None:
            done = done | (lengths >= longest)
        for copy in np.flatnonzero(done):
            if shares[copy]:
                shares[copy] -= 1
                played.append((float(returns[copy]), int(lengths[copy])))
        returns[done], lengths[done] = 0.0, 0
    environments.take_episodes()
    return Evaluation([r for r, _ in played], [n for _, n in played])


def what_to_tell(policy: Any, episode_starts: Any, action_masks: Any) -> dict[str, Any]:
    """What a policy is to be told beside the observations."""
    told = {"episode_starts": episode_starts} if getattr(policy, "remembers", False) else {}
    return told if action_masks is None else {**told, "action_masks": action_masks}
