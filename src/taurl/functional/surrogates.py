"""Surrogate objectives: losses whose gradient is a policy gradient."""

import torch
from torch import Tensor

from taurl.functional._inputs import require_same_shape


def clipped_surrogate(ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """PPO's clipped objective with bounds of its own on each side, as a loss per token (to be minimised).

        loss = −min( ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A )

    The gradient is that of −ρ·A, except where `clip_indicators` says the clip is active: there it is 0. Lifting
    ε_high above ε_low lets unlikely tokens grow (DAPO). Sequence ratios (GSPO) go in as token ratios do.

    Args:
        ratios: float [N, L].
        advantages: float [N, L], or [N, 1] for one per sequence.
        clip_low, clip_high: ε_low and ε_high, ≥ 0; `math.inf` for no clip.
    Returns: loss, [N, L].
    Raises: ValueError if shapes do not fit or a bound is negative.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 10.
    """
    advantages = _fitted(ratios, advantages, clip_low, clip_high)
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clip_indicators(ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where `clipped_surrogate` is flat: low where ρ < 1 − ε_low and A < 0, high where ρ > 1 + ε_high and A > 0.

    Args: as `clipped_surrogate`.
    Returns: low, high, bool [N, L]; their means over the mask are `clip_ratio/low_mean` and `clip_ratio/high_mean`.
    Raises: ValueError if shapes do not fit or a bound is negative.
    """
    advantages = _fitted(ratios, advantages, clip_low, clip_high)
    low = (ratios < 1 - clip_low) & (advantages < 0)
    high = (ratios > 1 + clip_high) & (advantages > 0)
    return low, high


def _fitted(ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low is {clip_low} and clip_high is {clip_high}, expected both to be at least 0")
    if advantages.dim() == ratios.dim() == 2 and advantages.shape[1] == 1:
        advantages = advantages.expand(-1, ratios.shape[1])
    require_same_shape(ratios=ratios, advantages=advantages)
    return advantages
