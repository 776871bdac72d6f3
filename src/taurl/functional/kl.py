"""Estimates of KL(π ‖ π_ref) from tokens that π sampled, one number per token.

With x = log π(o) − log π_ref(o) of a token o drawn from π, and E over π:

    name   value           expectation                                   sign
    k1     x               KL, unbiased                                  either
    k2     x² / 2          KL + terms of third order in x: biased        ≥ 0
    k3     e^(−x) − 1 + x  KL, unbiased where π_ref's support is in π's  ≥ 0

k3 is k1 plus a control variate of mean zero, so its variance is small where the policies are close; far apart, e^(−x)
can make it the worst of the three. These are statements about values. As a loss, differentiated with the sample held
fixed, the expected gradients are others: k1 gives zero, k2 gives ∇KL(π ‖ π_ref) of that token's distribution, k3
gives ∇KL(π_ref ‖ π).

Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html; k3 in GRPO:
    arXiv:2402.03300, eq. 4.
"""

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_same_shape
from taurl.functional.importance import LARGEST_LOG_RATIO


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log π − log π_ref: unbiased, of either sign.

    Args:
        logprobs, reference_logprobs: float, one shape: the same tokens under π, which drew them, and π_ref.
    Returns: that shape; float32, or float64 for float64.
    Raises: ValueError if shapes differ.
    """
    require_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    return at_least_float32(logprobs) - at_least_float32(reference_logprobs)


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """½ (log π − log π_ref)²: never negative, biased. Args, returns and errors as `k1`."""
    return 0.5 * k1(logprobs, reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """π_ref/π − 1 − log(π_ref/π): never negative, unbiased. Args, returns and errors as `k1`.

    The exponent stops at LARGEST_LOG_RATIO, so that the value stays finite.
    """
    log_ratios = k1(logprobs, reference_logprobs)
    # expm1: near 0 the terms cancel down to x²/2, which exp(−x) − 1 would lose to rounding.
    return torch.expm1((-log_ratios).clamp(max=LARGEST_LOG_RATIO)) + log_ratios
