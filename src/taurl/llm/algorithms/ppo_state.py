"""What a step of PPO hands to the next one beside the weights."""

import math

import torch
from torch import Tensor

from taurl.functional.kl_control import proportional_kl_coefficient
from taurl.functional.running import Moments, no_moments, normalized, updated_moments


class Controls:
    """The price of the divergence, and mean and deviation of the scores so far.

    Args:
        coefficient: β at first.
        target: divergence of a completion that β is adapted to; None leaves β as it is.
        gain: how fast.
    """

    def __init__(self, coefficient: float, target: float | None, gain: float):
        self.coefficient, self.target, self.gain = coefficient, target, gain
        self.scores = self.pending = no_moments()
        self.changes = 0

    def adapt(self, divergence: float) -> None:
        """Set β for the next step by this one's divergence."""
        self.changes += 1
        if self.target is not None:
            target, gain = self.target, self.gain
            self.coefficient = proportional_kl_coefficient(self.coefficient, divergence, target=target, gain=gain)

    def normalize(self, scores: Tensor, *, centered: bool = True) -> Tensor:
        """Scores [n] by the mean (if centered) and the deviation of all so far, these among them."""
        self.pending = now = updated_moments(self.scores, scores)
        mean = now.mean if centered else torch.zeros_like(now.mean)
        known = now.variance > 1e-12 * now.mean.square()  # equal scores have no scale, but rounding
        variance = torch.where(known, now.variance, 1.0)
        return normalized(scores, Moments(mean, variance, now.samples), bound=math.inf)

    def keep(self) -> None:
        """Take over the scores of a step that is through; one that fails leaves the state of the last whole step."""
        self.scores = self.pending
        self.changes += 1

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        coefficient = torch.tensor(self.coefficient, dtype=torch.float64)
        return {"coefficient": coefficient, **{f"scores/{k}": v for k, v in self.scores._asdict().items()}}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.coefficient = float(tensors["coefficient"])
        self.scores = self.pending = Moments(*(tensors[f"scores/{name}"] for name in Moments._fields))
