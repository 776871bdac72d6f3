"""From log-probabilities of tokens to the numbers that losses of preferences take: one per completion."""

import math
from typing import Literal

import torch
from torch import Tensor

from taurl.functional._inputs import (
    at_least_float32,
    require_fractions,
    require_mask,
    require_positive,
    require_rows,
)

Divergence = Literal["reverse_kl", "js_divergence", "forward_kl", "alpha_divergence"]

# A score's square, which IPO takes, and the sum over a batch of squares stay finite: 2e17 in float32, 5e138 in float64.
LARGEST_SCORE_EXPONENT = 0.45  # of the dtype's largest number


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each completion, the sum over its tokens.

    Args:
        logprobs: float [N, L]. Masked positions may hold anything and get no gradient.
        mask: bool [N, L], the tokens of the completion.
    Returns: sums, [N]; float32, or float64 for float64; 0 for an empty completion.
    Raises: ValueError if shapes differ or the mask is not boolean.
    """
    require_mask(mask, logprobs=logprobs)
    return torch.where(mask, at_least_float32(logprobs), 0.0).sum(1)


def length_desensitized_logprobs(logprobs: Tensor, mask: Tensor, public_lengths: Tensor, *, alpha: float) -> Tensor:
    """LD-DPO: log-probability of each completion, with less weight on what it is longer by than its pair's other one.

        Σ_{t ≤ l} log π(y_t) + α · Σ_{t > l} log π(y_t),   l = min(|y_w|, |y_l|)

    α = 1 is `sequence_logprobs`; α = 0 cuts both completions of a pair to the shorter one's length. Policy and
    reference both go through it, and every loss of `dpo_loss` takes the result.

    Args:
        logprobs: float [N, L]. Masked positions may hold anything and get no gradient.
        mask: bool [N, L], the tokens of the completion.
        public_lengths: int [N], l: `torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))`.
        alpha: α in [0, 1]; TRL calls it `ld_alpha`.
    Returns: weighted sums, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit, the mask is not boolean or alpha is outside [0, 1].
    Source: Liu et al. 2024, arXiv:2409.06411.
    """
    require_mask(mask, logprobs=logprobs)
    if public_lengths.shape != mask.shape[:1]:
        raise ValueError(
            f"public_lengths {list(public_lengths.shape)}, expected [{mask.shape[0]}], one per row of mask"
        )
    require_fractions(alpha=alpha)
    public = mask & (mask.cumsum(1) <= public_lengths[:, None])
    excess = sequence_logprobs(logprobs, mask & ~public)
    return sequence_logprobs(logprobs, public) + alpha * excess


def implicit_rewards(logprobs: Tensor, reference_logprobs: Tensor, *, beta: float) -> Tensor:
    """The reward that a policy stands for, for metrics: no gradient.

        r = β · ( log π(y) − log π_ref(y) ),   up to a constant of the prompt

    Args:
        logprobs, reference_logprobs: float [N], of whole completions.
        beta: β > 0.
    Returns: rewards, [N], detached; float32, or float64 for float64.
    Raises: ValueError if shapes differ or beta is not positive.
    Source: Rafailov et al. 2023, arXiv:2305.18290.
    """
    require_rows(logprobs=logprobs, reference_logprobs=reference_logprobs)
    require_positive(beta=beta)
    return beta * (at_least_float32(logprobs.detach()) - at_least_float32(reference_logprobs.detach()))


def divergence_scores(log_ratios: Tensor, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """What stands in place of the log-ratio where π is held near π_ref by another divergence than the reverse KL.

        D_f(π ‖ π_ref) = E_{π_ref} f(u),   u = π/π_ref = e^x;   the optimal policy has r = β · f'(u) + const

        divergence       f'(u) − f'(1)
        reverse_kl       log u = x                  KL(π ‖ π_ref): plain DPO
        js_divergence    log( 2u / (1 + u) )        Jensen–Shannon; bounded above, as the two below
        forward_kl       1 − 1/u                    KL(π_ref ‖ π)
        alpha_divergence ( 1 − u^−α ) / α           α → 0 is reverse_kl, α = 1 forward_kl

    The constant makes a score 0 where the policy is the reference. It cancels in a difference of two answers to one
    prompt, so losses of that difference (per token: where the answers are of one length) take another divergence than
    reverse_kl, and others do not. The names are TRL's. α is the paper's; TRL 1.16's
    `f_alpha_divergence_coef` is 1 − α, whatever its help says (both default to ½).

    Args:
        log_ratios: float [N], x.
        alpha: α in [0, 1], for "alpha_divergence" only.
    Returns: scores, [N], 0 where x is; float32, or float64 for float64. Where π is so unlikely that a power of u would
        take its score below −2e17 (float64: −5e138), the score stops there and the gradient is 0.
    Raises: ValueError if log_ratios are not float [N], the divergence is unknown or alpha is outside [0, 1].
    Source: Wang et al. 2023, arXiv:2309.16240.
    """
    require_rows(log_ratios=log_ratios)
    require_fractions(alpha=alpha)
    log_ratios = at_least_float32(log_ratios)
    match divergence:
        case "reverse_kl":
            return log_ratios
        case "js_divergence":
            return torch.nn.functional.logsigmoid(log_ratios) - torch.nn.functional.logsigmoid(log_ratios.new_zeros(()))
        case "forward_kl":
            return _power_score(log_ratios, 1.0)
        case "alpha_divergence":
            return _power_score(log_ratios, alpha) if alpha else log_ratios
    raise ValueError(
        f"divergence is {divergence!r}, expected one of 'reverse_kl', 'js_divergence', 'forward_kl', 'alpha_divergence'"
    )


def _power_score(log_ratios: Tensor, alpha: float) -> Tensor:
    # expm1: near 0, and for small α everywhere, 1 − exp(−αx) would lose its digits. The exponent's bound depends on α,
    # for what is bounded is the quotient. float64, where αx does not underflow: they are a few numbers.
    largest = torch.finfo(log_ratios.dtype).max ** LARGEST_SCORE_EXPONENT
    exponents = (-alpha * log_ratios.double()).clamp(max=math.log1p(alpha * largest))
    return (-torch.expm1(exponents) / alpha).to(log_ratios.dtype)
