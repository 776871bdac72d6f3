"""Importance ratios and weights: samples of one policy used for another.

    one number per …     name                        formula                              used for
    token                token_ratios                π/π_old                              PPO, GRPO
    sequence             sequence_ratios             its tokens' geometric mean           GSPO
    token                sequence_token_ratios       value of the above, gradient of π    GSPO-token
    step                 per_decision_log_weights    log Π_{t' ≤ t} π/μ                   expected rewards
    trajectory           trajectory_log_weights      log Π_t π/μ                          expected returns, VESPO
    token or sequence    mismatch_weights            π_old/μ, cut to a range              a sampler not quite π_old

π is the current policy, π_old the one before the update, μ the one that sampled. A ratio carries the gradient of π; a
weight that multiplies a loss is a number. Nothing is multiplied: logarithms are summed and exponentiated once.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, log_ratio, masked_log_ratio, require_mask, require_same_shape

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
    return _ratio(log_ratio(logprobs, old_logprobs))


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
    return _ratio(_mean_log_ratios(logprobs, old_logprobs, mask)).expand_as(mask)


def sequence_token_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The sequence's ratio in value, the token's in gradient.

        s_it = sg[s_i] · π(o_it) / sg[π(o_it)]          sg: gradient stopped, s_i: `sequence_ratios`

    Clipping then goes by the sequence while each token keeps an advantage of its own. With one advantage per sequence
    the gradient summed over a row is that of `sequence_ratios`.

    Args, Returns, Raises: as `sequence_ratios`, but [N, L] different gradients.
    Source: Zheng et al. 2025 (GSPO-token), arXiv:2507.18071, eq. 14.
    """
    value = _mean_log_ratios(logprobs, old_logprobs, mask).detach()
    kept = torch.where(mask, at_least_float32(logprobs), 0.0)
    return _ratio(value + (kept - kept.detach()))


def trajectory_log_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log p_θ(τ) / p_θ'(τ) of whole trajectories: Σ_t [ log π_θ(a_t|s_t) − log π_θ'(a_t|s_t) ].

    p(τ) is the product of what the environment and what the policy did; the start and the transitions are the
    environment's, the same under both policies, and cancel. So no model of the environment is needed.

    Not divided by the length, unlike `sequence_ratios`: this is the one that makes an expectation under θ. Its
    variance grows with every step.

    Args:
        logprobs, sampler_logprobs: float [N, L], of the same actions under θ and under θ', which drew them. −inf
            under θ is a weight of 0.
        mask: bool [N, L], the steps that count; the others may hold anything and get no gradient.
    Returns: log-weights, [N]; float32, or float64 for float64. A row without steps has 0.
    Raises: ValueError if shapes differ or the mask is not boolean.
    Source: Sutton and Barto 2018, "Reinforcement Learning", eq. 5.3.
    """
    return masked_log_ratio(logprobs, sampler_logprobs, mask).sum(1)


def per_decision_log_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log of the weight of each step's reward, the product of the ratios up to and including that step.

        w_t = Π_{t' ≤ t} π_θ(a_t'|s_t') / π_θ'(a_t'|s_t')

    A reward does not depend on actions after it, whose ratios have expectation 1: leaving them out keeps the
    expectation and saves their variance. The last column is `trajectory_log_weights`.

    Args: as `trajectory_log_weights`.
    Returns: log-weights, [N, L]; float32, or float64 for float64. A masked step holds the product before it.
    Raises: ValueError if shapes differ or the mask is not boolean.
    Source: Precup, Sutton and Singh 2000, "Eligibility Traces for Off-Policy Policy Evaluation".
    """
    return masked_log_ratio(logprobs, sampler_logprobs, mask).cumsum(1)


def expected_return(returns: Tensor, log_weights: Tensor, *, normalized: bool = False) -> Tensor:
    """E_θ[R] from trajectories that θ' drew.

        ordinary     1/N · Σ_i w_i R_i            unbiased, of large or even infinite variance
        normalized   Σ_i w_i R_i / Σ_i w_i        biased, consistent, never outside the range of the returns

    Both are of the whole batch: the normalized one cannot be summed up from micro-batches.

    Args:
        returns: float [N].
        log_weights: float [N], see `trajectory_log_weights`; of any size, see below.
        normalized: the second form, "weighted importance sampling".
    Returns: a number, []; float32, or float64 for float64 returns. The largest log-weight is taken out before anything
        is exponentiated, so the normalized form never overflows; the ordinary is infinite only where the mean is
        beyond the dtype. NaN where `normalized` and all weights are 0.
    Raises: ValueError if shapes differ, there is no trajectory, or inputs are not [N].
    Source: Sutton and Barto 2018, eq. 5.5 and 5.6.
    """
    if returns.dim() != 1 or not returns.numel():
        raise ValueError(f"returns are {list(returns.shape)}, expected [N] of at least one trajectory")
    require_same_shape(returns=returns, log_weights=log_weights)
    estimate = _weighted_means(returns[:, None], log_weights[:, None], normalized).sum()
    return estimate.to(at_least_float32(returns).dtype)


def expected_return_per_decision(
    rewards: Tensor, log_weights: Tensor, mask: Tensor, *, normalized: bool = False
) -> Tensor:
    """E_θ[Σ_t r_t] from trajectories that θ' drew, each reward with the weight of its own step.

        ordinary     Σ_t 1/N · Σ_i w_it r_it
        normalized   Σ_t ( Σ_i w_it r_it / Σ_i w_it )

    The normalized form divides step by step, where a trajectory that has ended counts on with its last weight and
    reward 0; it is consistent. For a discounted return give γ^t · r_t.

    Args:
        rewards: float [N, L]; masked ones may hold anything.
        log_weights: float [N, L], see `per_decision_log_weights`.
        mask: bool [N, L], the steps that count.
        normalized, Returns: as `expected_return`.
    Raises: ValueError if shapes differ, there is no trajectory or the mask is not boolean.
    Source: Precup, Sutton and Singh 2000, "Eligibility Traces for Off-Policy Policy Evaluation"; the normalized form:
        Thomas 2015, "Safe Reinforcement Learning", University of Massachusetts Amherst.
    """
    require_mask(mask, rewards=rewards, log_weights=log_weights)
    if not len(rewards):
        raise ValueError(f"rewards are {list(rewards.shape)}, expected at least one trajectory")
    estimate = _weighted_means(torch.where(mask, rewards, 0.0), log_weights, normalized).sum()
    return estimate.to(at_least_float32(rewards).dtype)


MismatchMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def mismatch_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, mode: MismatchMode, high: float, low: float = 0.0
) -> Tensor:
    """Weights that correct a loss for a sampler that is not quite the policy it stands for, without gradient.

        token_…      w_it = π_old(o_it) / μ(o_it)
        sequence_…   w_it = Π_t π_old(o_it) / μ(o_it), one for the whole row
        …_truncate   min(max(w, low), high)               TIS: what is too heavy counts less
        …_mask       w where low ≤ w ≤ high, else 0       MIS: what is out of range does not count

    The bounds buy a bounded variance with a bias. A sequence's weight is the product, not `sequence_ratios`: a mismatch
    of 0.2% on each of a thousand tokens, all to one side, makes it 7.4, and "sequence_mask" drops the row.

    The modes are those of TRL's `vllm_importance_sampling_mode`, whose bounds are 3 and none by default.

    Args:
        old_logprobs: float [N, L], π_old: the trainer's policy before the update.
        sampler_logprobs: float [N, L], μ: as the sampler drew them.
        mask: bool [N, L], the tokens that count.
        low, high: 0 ≤ low ≤ high, high > 0; `math.inf` for none above.
    Returns: weights, [N, L], 0 where masked; float32, or float64 for float64.
    Raises: ValueError if shapes differ, the mask is not boolean, the mode is unknown or the bounds are no range.
    Source: truncation: Ionides 2008, "Truncated Importance Sampling", Journal of Computational and Graphical
        Statistics 17(2).
    """
    if not (0 <= low <= high and high > 0):
        raise ValueError(f"low is {low} and high is {high}, expected 0 <= low <= high and high > 0")
    log_weights = masked_log_ratio(old_logprobs.detach(), sampler_logprobs.detach(), mask)
    match mode:
        case "token_truncate" | "token_mask":
            weights = _ratio(log_weights)
        case "sequence_truncate" | "sequence_mask":
            weights = _ratio(log_weights.sum(1, keepdim=True)).expand_as(mask)
        case _:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(MismatchMode))}")
    if mode.endswith("truncate"):
        return torch.where(mask, weights.clamp(low, high), 0.0)
    return torch.where(mask & (weights >= low) & (weights <= high), weights, 0.0)


def effective_sample_size(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """How many equally weighted samples the weighted ones are worth, (Σ w)² / Σ w².

    n for n equal weights, near 1 when one dominates, 0 when nothing counts. Divide by `mask.sum()` for a fraction. The
    scale cancels, so for log-weights of any size give `(log_weights - log_weights.amax()).exp()`.

    Args:
        weights: float of any shape, ≥ 0 where they count, anything elsewhere.
        mask: bool of that shape, the weights that count; by default all.
    Returns: a number, [] without gradient; float32, or float64 for float64.
    Raises: ValueError if shapes differ or the mask is not boolean.
    Source: Kong 1992, "A note on importance sampling using standardized weights", University of Chicago, report 348.
    """
    counted = at_least_float32(weights.detach())
    if mask is not None:
        require_same_shape(weights=weights, mask=mask)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}, expected booleans; pass mask.bool()")
        counted = torch.where(mask, counted, 0.0)
    # The scale cancels; with the largest weight at 1 no square overflows.
    counted = counted / counted.amax().clamp(min=torch.finfo(counted.dtype).tiny) if counted.numel() else counted
    squares = counted.square().sum()
    return torch.where(squares == 0, 0.0, counted.sum().square() / squares)


def _mean_log_ratios(logprobs: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    log_ratios = masked_log_ratio(logprobs, other, mask)
    return log_ratios.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _weighted_means(values: Tensor, log_weights: Tensor, normalized: bool) -> Tensor:
    """Over the rows: mean of w · v, or Σ w v / Σ w, per column; [L] in float64.

    float64 because they are a few numbers, and a product of weight and value is finite more often there.
    """
    values, log_weights = values.double(), log_weights.double()
    top = log_weights.detach().amax(0)
    top = torch.where(top.isfinite(), top, 0.0)  # all weights are 0: nothing to take out
    weights = (log_weights - top).exp()
    if normalized:
        return (weights * values).sum(0) / weights.sum(0)
    # exp(top) in three factors, so that it is not infinite where its product with a small mean is finite. e^2100 times
    # any float64 but 0 is infinite, and 0 stays 0, its gradient too where nothing but zeros is weighted.
    third = (torch.where((values != 0).any(0), top, 0.0).clamp(max=2100) / 3).exp()
    return (weights * values).mean(0) * third * third * third


def _ratio(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(max=LARGEST_LOG_RATIO).exp()
