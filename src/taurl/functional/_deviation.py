"""The standard deviation of everything that is normalized here."""

import torch
from torch import Tensor


def unbiased_std(deviations: Tensor, count: Tensor) -> Tensor:
    """√( Σ d² / (count − 1) ) along dimension 1, which is kept; deviations are 0 where nothing counts."""
    if not deviations.numel():
        return deviations.sum(1, keepdim=True)
    # The largest is taken out of the root, so that no square overflows or vanishes.
    largest = deviations.abs().amax(1, keepdim=True).clamp(min=torch.finfo(deviations.dtype).tiny)
    squares = (deviations / largest).square().sum(1, keepdim=True)
    return largest * (squares / (count - 1).clamp(min=1)).sqrt()
