"""Slopes of value losses, for those who go down them without automatic differentiation."""

import torch
from torch import Tensor

from taurl.functional._inputs import of_one_dtype, require_same_shape


@torch.no_grad()
def huber_value_slope(values: Tensor, targets: Tensor, *, threshold: float = 1.0) -> Tensor:
    """The derivative of `value_losses.huber_value_loss` with respect to V: clip(V − target, −κ, κ).

    Args:
        values, targets: float, of one shape.
        threshold: κ > 0.
    Returns: slope, the same shape, detached.
    Raises: ValueError if shapes differ or κ is not positive.
    Source: Mnih et al. 2015, Nature 518, Methods: "clip the error term".
    """
    require_same_shape(values=values, targets=targets)
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a positive number")
    values, targets = of_one_dtype(values, targets)
    return (values - targets).clamp(-threshold, threshold)
