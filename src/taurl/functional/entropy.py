"""Entropy: which tokens the policy was undecided about.

The entropies themselves come from `logprobs.chosen_logprobs`, with their gradient.
"""

import math

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_mask


def top_entropy_mask(entropies: Tensor, mask: Tensor, *, share: float) -> Tensor:
    """The tokens with the highest entropies of the batch, for a policy gradient from them alone.

        keep_it = mask_it and H_it ≥ τ,   τ the (1 − ρ)-quantile of the entropies that the mask counts

    Of n different entropies the k = ⌊ρ·(n − 1)⌋ + 1 highest are at or above that quantile (the usual one, linear
    between neighbours), and those are kept. Entropies equal to the lowest one kept are kept with it, so that neither
    order nor padding matters. TRL calls ρ `top_entropy_quantile`. ρ = 1 keeps every token and ρ = 0 none, whereas TRL's
    0 keeps the highest.

    The quantile is of the whole optimizer batch: take the entropies in a pass before the update. TRL takes it of the
    micro-batch that all its processes hold at that moment, so that what is kept depends on how the batch is cut.

    Multiply the policy's term of the loss by the result and leave `token_weights` those of the full mask: what the
    kept tokens count, and the KL term of all, then stay as they are.

    Args:
        entropies: float [N, L], ≥ 0 where they count, anything elsewhere.
        mask: bool [N, L], of the whole optimizer batch.
        share: ρ in [0, 1], of the tokens to keep; 0.2 in the paper.
    Returns: bool [N, L], within the mask.
    Raises: ValueError if shapes differ, the mask is not boolean, ρ is outside [0, 1] or an entropy that counts is NaN.
    Source: Wang et al. 2025, arXiv:2506.01939.
    """
    require_mask(mask, entropies=entropies)
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected a number from 0 to 1")
    counted = at_least_float32(entropies.detach())[mask]
    if counted.isnan().any():
        raise ValueError(
            f"{int(counted.isnan().sum())} of {len(counted)} entropies are NaN, expected none under the mask"
        )
    if not len(counted) or share == 0:
        return torch.zeros_like(mask)
    # 0.29 · 100 is 28.999999999999996 in floats: what is whole but for rounding counts as whole.
    kept = math.floor(share * (len(counted) - 1) * (1 + 1e-12)) + 1
    lowest_kept = counted.kthvalue(len(counted) - kept + 1).values
    return mask & (at_least_float32(entropies.detach()) >= lowest_kept)
