"""Running normalisation of observations and rewards. Its state travels with the policy; evaluation leaves it alone."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from taurl.functional.running import Moments, no_moments, normalized, updated_moments

BOUND = 10.0
Array = np.ndarray[Any, Any]


class Normalizer:
    """Shifts and scales observations, and scales rewards, where asked to; else passes them through.

    Args:
        size: d of an observation.
        count: B, the environments whose returns are followed.
        discount: of those returns.
    """

    def __init__(self, size: int, count: int, *, observations: bool, rewards: bool, discount: float):
        self.scales_observations, self.scales_rewards, self.discount = observations, rewards, discount
        self.seen: Moments = no_moments(size)
        self.returned: Moments = no_moments()
        self.running_returns = torch.zeros(count)
        self.changes = 0

    def observe(self, observations: Tensor, counted: Array | None = None) -> Tensor:
        """Count a batch of observations [B, d] in, or of it those that are counted, bool [B], and normalise it."""
        if self.scales_observations:
            self.seen = updated_moments(self.seen, observations if counted is None else observations[counted])
            self.changes += 1
        return self.apply(observations)

    def begin_episodes(self) -> None:
        """Episodes begin in every environment, whether the last ones had ended or not."""
        self.running_returns = torch.zeros_like(self.running_returns)

    def apply(self, observations: Tensor) -> Tensor:
        """Normalise observations [.., d] by what has been seen so far."""
        return normalized(observations, self.seen, bound=BOUND) if self.scales_observations else observations

    def rewards(self, rewards: Tensor, done: Tensor, valid: Tensor) -> Tensor:
        """Scale rewards [T, B] by the deviation of the discounted sums of past rewards, without shifting them.

        The sum runs forward, R_t = γ R_{t−1} + r_t, as in OpenAI's baselines: a scale, not a return to learn.
        """
        if not self.scales_rewards:
            return rewards
        scaled = torch.empty_like(rewards)
        for t in range(len(rewards)):
            self.running_returns = self.discount * self.running_returns + rewards[t]
            self.returned = updated_moments(self.returned, self.running_returns[valid[t]])
            scaled[t] = rewards[t] / (self.returned.variance + 1e-8).sqrt().float()
            self.running_returns = self.running_returns.masked_fill(done[t], 0.0)
        self.changes += 1
        return scaled.clamp(-BOUND, BOUND)

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        found = {f"seen/{name}": value for name, value in self.seen._asdict().items()}
        found |= {f"returned/{name}": value for name, value in self.returned._asdict().items()}
        return found | {"running_returns": self.running_returns}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.seen = Moments(*(tensors[f"seen/{name}"] for name in Moments._fields))
        self.returned = Moments(*(tensors[f"returned/{name}"] for name in Moments._fields))
        self.running_returns = tensors["running_returns"]
