"""Importance ratios and weights: samples of one policy used for another."""

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_mask, require_same_shape

# exp(60) = 1e26: far beyond a ratio that means anything, yet its product with an advantage and the sum over a batch
# stay finite in float32. Above it the ratio is constant and its gradient 0.
LARGEST_LOG_RATIO = 60.0


def token_ratios(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Importance ratio of each token, π(o_t) / π_old(o_t).

    On the first update after sampling pass `logprobs.detach()` as old: the ratio is exactly 1 and carries the policy
    gradient.

    Args:
        logprobs, old_logprobs: float [N, L], log-probabilities of the same tokens under the current policy and the
            one before the update.
    Returns: ratios, [N, L]; float32, or float64 for float64. Finite for finite input: log-ratios stop at
        LARGEST_LOG_RATIO.
    Raises: ValueError if shapes differ.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 6; per token as in arXiv:2402.03300, eq. 3.
    """
    return _ratio(_log_ratios(logprobs, old_logprobs))


def sequence_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Importance ratio of each sequence, the geometric mean of its tokens' ratios.

        s_i = exp( 1/|o_i| · Σ_t [ log π(o_it) − log π_old(o_it) ] )

    The same number stands at every position of its row, masked ones included, so that it takes the place of
    `token_ratios` in what follows. A row without tokens has ratio 1. Masked positions may hold anything and get no
    gradient.

    Args:
        logprobs, old_logprobs: float [N, L].
        mask: bool [N, L], the tokens that count.
    Returns: ratios, [N, L], a view of N numbers; float32, or float64 for float64.
    Raises: ValueError if shapes differ or the mask is not boolean.
    Source: Zheng et al. 2025 (GSPO), arXiv:2507.18071, eq. 7.
    """
    log_ratios = _log_ratios(logprobs, old_logprobs)
    require_mask(mask, logprobs=logprobs)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(mask, log_ratios, 0.0).sum(1, keepdim=True) / count
    return _ratio(mean).expand_as(mask)


def truncated_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance-sampling weights, min(π / π_sampler, cap), one per token, without gradient.

    They multiply a loss to correct that the sampler's probabilities are not quite the trainer's. The cap bounds the
    variance that a token nearly impossible for the sampler would bring, at the price of a bias.

    Args:
        logprobs: float [N, L], under the trainer's policy before the update.
        sampler_logprobs: float [N, L], as the sampler drew them.
        cap: largest weight, > 0; `math.inf` for none.
    Returns: weights in [0, cap], [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or cap is not positive.
    Source: Ionides 2008, "Truncated Importance Sampling", Journal of Computational and Graphical Statistics 17(2).
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}, expected a positive number")
    return _ratio(_log_ratios(logprobs.detach(), sampler_logprobs.detach())).clamp(max=cap)


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """How many equally weighted samples the weighted ones are worth, (Σ w)² / Σ w².

    n for n equal weights, near 1 when one dominates, 0 when nothing counts. Divide by `mask.sum()` for a fraction.

    Args:
        weights: float [N, L], ≥ 0 where they count, anything elsewhere.
        mask: bool [N, L], the weights that count.
    Returns: a number, [] without gradient; float32, or float64 for float64.
    Raises: ValueError if shapes differ or the mask is not boolean.
    Source: Kong 1992, "A note on importance sampling using standardized weights", University of Chicago, report 348.
    """
    require_mask(mask, weights=weights)
    counted = torch.where(mask, at_least_float32(weights.detach()), 0.0)
    # The scale cancels; with the largest weight at 1 no square overflows.
    counted = counted / counted.amax().clamp(min=torch.finfo(counted.dtype).tiny) if counted.numel() else counted
    squares = counted.square().sum()
    return torch.where(squares == 0, 0.0, counted.sum().square() / squares)


def _log_ratios(logprobs: Tensor, other: Tensor) -> Tensor:
    require_same_shape(logprobs=logprobs, other_logprobs=other)
    return at_least_float32(logprobs) - at_least_float32(other)


def _ratio(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(max=LARGEST_LOG_RATIO).exp()
