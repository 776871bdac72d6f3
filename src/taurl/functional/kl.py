"""KL divergence of a policy π from its reference π_ref: exact, estimated from samples, and as something to descend.

With x = log π(o) − log π_ref(o) of an o that π drew (a token given those before it, or a whole sequence), and E over π:

    name   value           expectation                                   sign
    k1     x               KL, unbiased                                  either
    k2     x² / 2          KL + terms of third order in x: biased        ≥ 0
    k3     e^(−x) − 1 + x  KL, unbiased where π_ref's support is in π's  ≥ 0

k3 is k1 plus a control variate of mean zero, so its variance is small where the policies are close; far apart, e^(−x)
can make it the worst of the three.

These are statements about values. An estimator good for the value is not thereby good to descend: the samples depend on
the policy too, and a token also decides which states come after it. So it matters where the estimate is put: in the
reward, as a number that later multiplies ∇log π (`kl_penalty`); as a loss, differentiated with the sample held fixed
(`kl_loss`); or as a loss weighted by importance ratios. And it matters whether it is taken of each token's log-ratio
x_t or of the sequence's, X = Σ_t x_t. The expected gradients, for descent on the sum over the tokens of a sequence:

    estimator, level  in the reward                  as a loss     as a weighted loss
    k1, token         ∇KL(π‖π_ref)                   0             ∇KL(π‖π_ref) by prefix ratios, F by token ratios
    k1, sequence      ∇KL(π‖π_ref)                   0             ∇KL(π‖π_ref)
    k2, token         ∇E[Σ_t x_t²/2] − F             F             F (of another sampler: by prefix ratios)
    k2, sequence      ∇E[X²/2] − ∇KL(π‖π_ref)        ∇KL(π‖π_ref)  ∇KL(π‖π_ref)
    k3, token         ∇KL(π‖π_ref) − R               R             ∇KL(π‖π_ref) by prefix ratios, F by token ratios
    k3, sequence      ∇KL(π‖π_ref) − ∇KL(π_ref‖π)    ∇KL(π_ref‖π)  ∇KL(π‖π_ref)

    F = Σ_t E ∇KL(π(·|o_<t) ‖ π_ref(·|o_<t)),   R = Σ_t E ∇KL(π_ref(·|o_<t) ‖ π(·|o_<t)),   o_<t sampled, held fixed

F lacks what a token does to the states after it; R is F with the divergence turned round, equal to it to first order
near π_ref. k2 and k3 in the reward are worse than biased: near π_ref their terms of first order cancel, and nothing
pulls back a policy that has not gone far. All of this holds without division by a standard deviation, without length
normalization and without truncated sampling. `KL_GRADIENTS` is the same table for programs, `KL_GRADIENT_CONDITIONS`
says when it holds, and the tests prove every row by enumeration.

Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html (values); Liu et al. 2025,
    arXiv:2510.01555, and Tang and Munos 2025, arXiv:2506.09477 (gradients); k3 in GRPO: arXiv:2402.03300, eq. 4; k3
    weighted by the ratio: arXiv:2512.02556.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, log_ratio, masked_log_ratio, require_same_shape
from taurl.functional.importance import LARGEST_LOG_RATIO, per_decision_log_weights, trajectory_log_weights

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]
Place = Literal["reward", "loss", "weighted_loss"]

_F = "Σ_t E ∇KL(π(·|o_<t)‖π_ref(·|o_<t)) with o_<t held fixed"
_R = "Σ_t E ∇KL(π_ref(·|o_<t)‖π(·|o_<t)) with o_<t held fixed"
_WEIGHTED_TOKENS = f"∇KL(π‖π_ref) if weighted by prefix ratios; by token ratios {_F}, o_<t as the sampler drew it"

KL_GRADIENTS: dict[tuple[Estimator, Place, Level], str] = {
    ("k1", "reward", "token"): "∇KL(π‖π_ref)",
    ("k1", "reward", "sequence"): "∇KL(π‖π_ref), usually with more variance than per token",
    ("k2", "reward", "token"): f"∇E[Σ_t x_t²/2] − {_F}: of second order near π_ref, hardly pulls",
    ("k2", "reward", "sequence"): "∇E[X²/2] − ∇KL(π‖π_ref): of second order near π_ref, hardly pulls",
    ("k3", "reward", "token"): f"∇KL(π‖π_ref) − {_R}: of second order near π_ref, hardly pulls",
    ("k3", "reward", "sequence"): "∇KL(π‖π_ref) − ∇KL(π_ref‖π): of second order near π_ref, hardly pulls",
    ("k1", "loss", "token"): "0: noise",
    ("k1", "loss", "sequence"): "0: noise",
    ("k2", "loss", "token"): f"{_F}: lacks what a token does to later ones",
    ("k2", "loss", "sequence"): "∇KL(π‖π_ref)",
    ("k3", "loss", "token"): f"{_R}: biased, near π_ref about {_F}",
    ("k3", "loss", "sequence"): "∇KL(π_ref‖π): the other divergence",
    ("k1", "weighted_loss", "token"): _WEIGHTED_TOKENS,
    ("k1", "weighted_loss", "sequence"): "∇KL(π‖π_ref), and noise of mean 0",
    ("k2", "weighted_loss", "token"): f"{_F}: lacks what a token does to later ones",
    ("k2", "weighted_loss", "sequence"): "∇KL(π‖π_ref)",
    ("k3", "weighted_loss", "token"): _WEIGHTED_TOKENS,
    ("k3", "weighted_loss", "sequence"): "∇KL(π‖π_ref), sample by sample that of k2",
}
"""The expected gradient of each (estimator, place, level); the notation is the module's."""

KL_GRADIENT_CONDITIONS = (
    "Exact for samples of π itself (a weighted loss: of any sampler whose support holds π's), drawn without top-k, "
    "top-p or min-p; without division by a standard deviation or by the length of the sequence: token losses are "
    "summed over each sequence; k3 where π can sample whatever π_ref can."
)


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log π − log π_ref: unbiased, of either sign.

    Args:
        logprobs, reference_logprobs: float, one shape: the same tokens under π, which drew them, and π_ref.
    Returns: that shape; float32, or float64 for float64.
    Raises: ValueError if shapes differ.
    """
    return _estimate("k1", log_ratio(logprobs, reference_logprobs))


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """½ (log π − log π_ref)²: never negative, biased. Args, returns and errors as `k1`."""
    return _estimate("k2", log_ratio(logprobs, reference_logprobs))


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """π_ref/π − 1 − log(π_ref/π): never negative, unbiased. Args, returns and errors as `k1`.

    A log-ratio below −LARGEST_LOG_RATIO counts as that, without gradient, so that the value stays finite.
    """
    return _estimate("k3", log_ratio(logprobs, reference_logprobs))


def kl_penalty(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: Estimator = "k1",
    level: Level = "token",
) -> Tensor:
    """The divergence as part of the reward: what a trainer subtracts, times β, from each token's advantage.

        "token"     Σ_{t'≥t} k(x_t')   reward-to-go: a token answers for itself and for what comes after it
        "sequence"  k(Σ_t' x_t')       the same number at every token of the row

    A surrogate of advantages − β · penalty, summed over the tokens, descends β times the gradient that `KL_GRADIENTS`
    gives for "reward": with "k1" that is ∇KL(π‖π_ref), at both levels; "token" leaves out what a token cannot change
    and so has less variance, usually. The token's own estimate alone, without what follows, gives F (see the module).
    A baseline may be subtracted, a standard deviation must not divide.

    x is that of the policy that is differentiated. Where an update takes several steps with the penalty computed once,
    the later steps have ∇KL(π‖π_ref) − ∇KL(π‖π_sampler) in expectation. For samples of another policy, the importance
    weight of the whole sequence on the loss makes both gradients right, that of the rewards and this one; with each
    token's own ratio neither is.

    TRL's RLOO is k1 of the sequence. Its former PPO trainer offered k3 here too, as the estimate with less variance: of
    the value it is, but near π_ref its gradient vanishes. The default is the one that is right.

    Args:
        logprobs, reference_logprobs: float [N, L], the sampled tokens under π and π_ref.
        mask: bool [N, L], the tokens that count; the others may hold anything.
    Returns: penalty [N, L], detached, 0 where masked; float32, or float64 for float64.
    Raises: ValueError if shapes differ, the mask is not boolean, or estimator or level is unknown.
    Source: reward-to-go: Tang and Munos 2025, arXiv:2506.09477.
    """
    log_ratios = masked_log_ratio(logprobs.detach(), reference_logprobs.detach(), mask)
    if _is_token(level):
        estimates = _estimate(estimator, log_ratios)  # 0 where masked, as is each estimate of a log-ratio of 0
        penalty = estimates.flip(1).cumsum(1).flip(1)
    else:
        penalty = _estimate(estimator, log_ratios.sum(1, keepdim=True))
    return torch.where(mask, penalty, 0.0)


def kl_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: Estimator,
    level: Level,
    ratios: Tensor | None = None,
) -> Tensor:
    """The divergence as a loss, per token and to be added, times β, to the surrogate's.

        "token"     ρ_t · k(x_t)
        "sequence"  ρ · k(Σ_t x_t) / |o|   at each of the row's |o| tokens: they add up to the sequence's ρ · k(X)

    `KL_GRADIENTS` says what each descends: "loss" without ratios, for samples of π only; "weighted_loss" with them.
    Without them only k2 of the sequence gives ∇KL(π‖π_ref), and k1 of what another sampler drew moves π away from that
    sampler: it descends −KL(π_sampler‖π). Both levels are made for sums over the tokens of a sequence: `token_weights`
    "sum", or "constant", which scales it by one factor. "token" divides by the tokens that happened to be sampled,
    which is such a factor only for large batches; with "sequence", which divides each row by its length, no divergence
    is descended.

    Ratios ρ = π / π_sampler correct for another sampler, and keep their gradient where the theory wants it: with k1 and
    k3, whose expectation is the divergence for every π, so that the gradient of the weighted estimate is right; with
    k2, whose gradient is right and whose value is not, they are detached. Weighted alike, by the sequence's ratio or by
    each token's own, k3 and k2 then have the same gradient on every sample, ρ · x · ∇log π (of k3 the difference of two
    terms of size ρ · e^(−x), which float32 loses below x = −15; on-policy that has a probability of e^(−15)).
    On-policy pass a ratio of value 1 that carries the gradient, π / π.detach(): this repairs k1 and k3. Which ratio
    belongs to which level:

        "sequence"  Π_t π(o_t|o_<t) / π_sampler(o_t|o_<t), not its |o|-th root, at every position of the row: exp of
                    `trajectory_log_weights`
        "token"     the product over the tokens up to t for ∇KL(π‖π_ref) with k1 and k3: exp of
                    `per_decision_log_weights`; each token's own, `token_ratios`, has less variance and gives F

    A log-weight is clamped to LARGEST_LOG_RATIO before its exp.

    GRPO uses k3 per token without ratios, which descends R. TRL's `beta` is k3 per token with the token's own ratio
    (`use_bias_correction_kl`, on by default in 1.16), and descends F; with its sequence-level ratios, a geometric mean,
    it is neither.

    Args:
        logprobs, reference_logprobs: float [N, L], the sampled tokens under π and π_ref.
        mask: bool [N, L], the tokens that count; the others may hold anything.
        ratios: float [N, L], ≥ 0.
    Returns: loss [N, L], 0 and without gradient where masked; float32, or float64 for float64. Weighted values stop
        at exp(LARGEST_LOG_RATIO), with gradient 0 above it.
    Raises: ValueError if shapes differ, the mask is not boolean, or estimator or level is unknown.
    Source: Liu et al. 2025, arXiv:2510.01555; k3 with ratios: arXiv:2512.02556.
    """
    log_ratios = masked_log_ratio(logprobs, reference_logprobs, mask)
    if _is_token(level):
        loss = _estimate(estimator, log_ratios)
    else:
        loss = _estimate(estimator, log_ratios.sum(1, keepdim=True)) / mask.sum(1, keepdim=True).clamp(min=1)
    if ratios is not None:
        require_same_shape(ratios=ratios, mask=mask)
        weights = torch.where(mask, at_least_float32(ratios.detach() if estimator == "k2" else ratios), 0.0)
        if estimator == "k3":  # where it is bounded it has no gradient, by its weight neither
            scored = log_ratios if _is_token(level) else log_ratios.sum(1, keepdim=True)
            weights = torch.where(scored < -LARGEST_LOG_RATIO, weights.detach(), weights)
        # A ratio and an e^(−x), each at its bound, would overflow float32 together.
        loss = (weights * loss).clamp(max=math.exp(LARGEST_LOG_RATIO))
    return torch.where(mask, loss, 0.0)


def kl_ratios(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, level: Level) -> Tensor:
    """The ratios π / π_sampler with which `kl_loss` descends ∇KL(π‖π_ref), with their gradient.

        "token"     Π_{t'≤t} ρ_t'   what a token's estimate depends on
        "sequence"  Π_t' ρ_t'       the same number at every token of the row

    On-policy their value is 1, and what they add is the gradient.

    Args:
        logprobs, sampler_logprobs: float [N, L], the tokens under π and under what drew them.
        mask: bool [N, L], the tokens that count; the others may hold anything.
    Returns: ratios [N, L]; float32, or float64 for float64. Log-ratios stop at LARGEST_LOG_RATIO.
    Raises: ValueError if shapes differ, the mask is not boolean or the level is unknown.
    """
    if _is_token(level):
        log_weights = per_decision_log_weights(logprobs, sampler_logprobs, mask)
    else:
        log_weights = trajectory_log_weights(logprobs, sampler_logprobs, mask)[:, None].expand_as(mask)
    return log_weights.clamp(max=LARGEST_LOG_RATIO).exp()


def categorical_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(π‖π_ref) of categorical distributions, summed exactly over the classes.

        Σ_v π_v (log π_v − log π_ref,v),   π = softmax logits

    A logit of −∞ forbids a class. Forbidden to π, or so unlikely that its probability rounds to 0, it counts 0 whatever
    π_ref holds; forbidden to π_ref alone, the divergence is infinite, and its gradient means nothing. Its mean over the
    states that π visits has the gradient F of the module, not ∇KL of the sequences. Both arguments keep their gradient.

    Args:
        logits, reference_logits: float [..., V], each row with at least one finite logit.
    Returns: divergences [...]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or there is no class.
    """
    require_same_shape(logits=logits, reference_logits=reference_logits)
    if not (logits.dim() and logits.shape[-1]):
        raise ValueError(f"logits are {list(logits.shape)}, expected [..., V] with at least one class")
    logprobs, reference = (at_least_float32(each).log_softmax(-1) for each in (logits, reference_logits))
    possible = logprobs.exp() != 0  # a NaN stays one
    # Filled before they are used: −∞ would come back as a NaN in the gradient.
    logprobs, reference = torch.where(possible, logprobs, 0.0), torch.where(possible, reference, 0.0)
    return (logprobs.exp() * (logprobs - reference)).sum(-1)


def diagonal_gaussian_kl(mean: Tensor, log_std: Tensor, reference_mean: Tensor, reference_log_std: Tensor) -> Tensor:
    """KL(π‖π_ref) of Gaussians with independent dimensions.

        Σ_i [ log σ_ref,i − log σ_i + (σ_i² + (μ_i − μ_ref,i)²) / (2 σ_ref,i²) − ½ ]

    All arguments keep their gradient. A `log_std` shared by the states is expanded by the caller.

    Args:
        mean, log_std, reference_mean, reference_log_std: float [..., d], one shape.
    Returns: divergences [...]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or there is no dimension.
    """
    require_same_shape(mean=mean, log_std=log_std, reference_mean=reference_mean, reference_log_std=reference_log_std)
    if not (mean.dim() and mean.shape[-1]):
        raise ValueError(f"mean is {list(mean.shape)}, expected [..., d] with at least one dimension")
    mean, log_std, reference_mean, reference_log_std = map(
        at_least_float32, (mean, log_std, reference_mean, reference_log_std)
    )
    shrinkage = log_std - reference_log_std
    half = (-0.5 * reference_log_std).exp()  # 1/σ_ref in two halves: alone it may overflow where the product does not
    distance = (mean - reference_mean) * half * half
    # expm1: for close policies the terms cancel down to second order, which exp − 1 would lose to rounding.
    return 0.5 * (torch.expm1(2 * shrinkage) - 2 * shrinkage + distance.square()).sum(-1)


def _estimate(estimator: Estimator, log_ratios: Tensor) -> Tensor:
    match estimator:
        case "k1":
            return log_ratios
        case "k2":
            return 0.5 * log_ratios.square()
        case "k3":
            # expm1: near 0 the terms cancel down to x²/2, which exp(−x) − 1 would lose to rounding. The whole x is
            # bounded: with the exponent alone bounded, what is left beyond it would have a slope of the wrong sign.
            bounded = log_ratios.clamp(min=-LARGEST_LOG_RATIO)
            return torch.expm1(-bounded) + bounded
        case _:
            raise ValueError(f"estimator is {estimator!r}, expected 'k1', 'k2' or 'k3'")


def _is_token(level: Level) -> bool:
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}, expected 'token' or 'sequence'")
    return level == "token"
