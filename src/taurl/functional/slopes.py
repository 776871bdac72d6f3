"""Slopes of losses, for those who go down them without automatic differentiation.

For a few dozen numbers a row, recording what is done and going back through it costs several times what is done. The
tests hold each slope against automatic differentiation of the loss it belongs to.
"""

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


@torch.no_grad()
def clipped_value_slope(values: Tensor, old_values: Tensor, targets: Tensor, *, clip: float) -> Tensor:
    """The derivative of `value_losses.clipped_value_loss` with respect to V: V − target, or 0 where the clip is active.

    Args:
        values, old_values, targets: float, of one shape.
        clip: ε ≥ 0.
    Returns: slope, the same shape, detached.
    Raises: ValueError if shapes differ or ε is negative.
    """
    if not clip >= 0:
        raise ValueError(f"clip is {clip}, expected at least 0")
    require_same_shape(values=values, old_values=old_values, targets=targets)
    values, old_values, targets = of_one_dtype(values, old_values, targets)
    near = values.clamp(old_values - clip, old_values + clip)
    slopes = values - targets
    return slopes * (slopes.abs() >= (near - targets).abs())


@torch.no_grad()
def clipped_surrogate_slope(ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """The derivative of `surrogates.clipped_surrogate` with respect to log π: −ρ·A, or 0 where the clip is active.

    Args:
        ratios, advantages: float, of one shape.
        clip_low, clip_high: ε_low and ε_high, ≥ 0.
    Returns: slope, the same shape, detached.
    Raises: ValueError if shapes differ or a bound is negative.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, with dρ/d log π = ρ.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low is {clip_low} and clip_high {clip_high}, expected at least 0")
    require_same_shape(ratios=ratios, advantages=advantages)
    ratios, advantages = of_one_dtype(ratios, advantages)
    gains = ratios * advantages
    return -gains * (gains <= ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
