"""Evaluation: whole episodes, in environments of their own, with the normalisation frozen."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from taurl.control.environments import Environments

COPIES = 10
PERCENTILES = (10, 50, 90)


class Acting(Protocol):
    """What can be evaluated: anything that acts on a batch of observations."""

    def act(self, batch: Any, *, deterministic: bool = True) -> Any: ...


class Evaluation(NamedTuple):
    """Undiscounted returns and lengths of the episodes."""

    returns: list[float]
    lengths: list[int]

    def metrics(self) -> dict[str, float]:
        """Mean, standard deviation and percentiles of the return, and the mean length, by `eval/…` names."""
        found = {"eval/mean_reward": float(np.mean(self.returns)), "eval/std_reward": float(np.std(self.returns))}
        found |= {f"eval/reward_p{p}": float(np.percentile(self.returns, p)) for p in PERCENTILES}
        return found | {"eval/mean_ep_length": float(np.mean(self.lengths))}


def evaluate(policy: Acting, environments: Environments, episodes: int, *, deterministic: bool = True) -> Evaluation:
    """Play so many whole episodes.

    Every copy plays its share, and what it plays beyond is left out: taking the first to finish would favour short
    episodes.
    """
    shares = np.full(environments.count, episodes // environments.count)
    shares[: episodes % environments.count] += 1
    returns, lengths = np.zeros(environments.count), np.zeros(environments.count, dtype=int)
    played: list[tuple[float, int]] = []
    observations = environments.reset()
    while shares.any():
        one = environments.step(policy.act(observations, deterministic=deterministic))
        observations = one.observations
        returns += one.rewards
        lengths += ~one.only_reset
        done = one.terminated | one.truncated
        for copy in np.flatnonzero(done):
            if shares[copy]:
                shares[copy] -= 1
                played.append((float(returns[copy]), int(lengths[copy])))
        returns[done], lengths[done] = 0.0, 0
    environments.take_episodes()
    return Evaluation([r for r, _ in played], [n for _, n in played])
