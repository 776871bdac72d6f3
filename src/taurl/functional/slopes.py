"""Slopes of losses, for those who go down them without automatic differentiation.

For a few dozen numbers a row, recording what is done and going back through it costs several times what is done, and an
operator of torch several times one of numpy: these are functions of tensors or of numpy's arrays, alike. The tests hold
each slope against automatic differentiation of the loss it belongs to.
"""

from typing import Any

from taurl.functional._inputs import require_same_shape

Array = Any  # a tensor, or an array of numpy


def huber_value_slope(values: Array, targets: Array, *, threshold: float = 1.0) -> Array:
    """The derivative of `value_losses.huber_value_loss` with respect to V: clip(V − target, −κ, κ).

    Args:
        values, targets: float, of one shape.
        threshold: κ > 0.
    Returns: slope, the same shape.
    Raises: ValueError if shapes differ or κ is not positive.
    Source: Mnih et al. 2015, Nature 518, Methods: "clip the error term".
    """
    require_same_shape(values=values, targets=targets)
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a positive number")
    return (values - targets).clip(-threshold, threshold)


def clipped_value_slope(values: Array, old_values: Array, targets: Array, *, clip: float) -> Array:
    """The derivative of `value_losses.clipped_value_loss` with respect to V: V − target, or 0 where the clip is active.

    Args:
        values, old_values, targets: float, of one shape.
        clip: ε ≥ 0.
    Returns: slope, the same shape.
    Raises: ValueError if shapes differ or ε is negative.
    """
    if not clip >= 0:
        raise ValueError(f"clip is {clip}, expected at least 0")
    require_same_shape(values=values, old_values=old_values, targets=targets)
    near = values.clip(old_values - clip, old_values + clip)
    slopes = values - targets
    return slopes * (abs(slopes) >= abs(near - targets))


def clipped_surrogate_slope(ratios: Array, advantages: Array, *, clip_low: float, clip_high: float) -> Array:
    """The derivative of `surrogates.clipped_surrogate` with respect to log π: −ρ·A, or 0 where the clip is active.

    Args:
        ratios, advantages: float, of one shape.
        clip_low, clip_high: ε_low and ε_high, ≥ 0.
    Returns: slope, the same shape.
    Raises: ValueError if shapes differ or a bound is negative.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, with dρ/d log π = ρ.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low is {clip_low} and clip_high {clip_high}, expected at least 0")
    require_same_shape(ratios=ratios, advantages=advantages)
    gains = ratios * advantages
    return -gains * (gains <= ratios.clip(1 - clip_low, 1 + clip_high) * advantages)
