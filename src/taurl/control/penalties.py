"""The price of moving a policy away from the one that acted, adapted to keep the divergence near a target."""

import torch
from torch import Tensor

from taurl.control.distributions import ActionDistribution, Array
from taurl.functional.aggregation import weighted_sum
from taurl.functional.kl_control import adapted_kl_coefficient


class KLPenalty:
    """β · KL(π_old ‖ π), exact.

    Args:
        coefficient: β at first.
        target: what `adapt` keeps the divergence near.
    """

    def __init__(self, coefficient: float, target: float):
        self.coefficient, self.target, self.changes = coefficient, target, 0

    def gradient(self, distribution: ActionDistribution, old: Tensor, parameters: Array, weights: Tensor) -> Array:
        """That of the price, a weighted mean over the rows, in the parameters of π, [N, ..]."""
        with torch.enable_grad():
            leaf = torch.from_numpy(parameters).clone().requires_grad_()
            price = self.coefficient * weighted_sum(distribution.kl(old, leaf), weights)
        found: Array = torch.autograd.grad(price, leaf)[0].numpy()
        return found

    def adapt(self, divergence: float) -> None:
        """Set β for the next iteration by the divergence that this one ended with."""
        self.coefficient = adapted_kl_coefficient(self.coefficient, divergence, target=self.target)
        self.changes += 1

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"coefficient": torch.tensor(self.coefficient, dtype=torch.float64)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.coefficient = float(tensors["coefficient"])
