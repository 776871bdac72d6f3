"""Surrogate objectives: losses whose gradient is a policy gradient.

One loss per token, to be minimized; what a token counts in the whole is `aggregation`'s business. With ρ the ratio of a
token or of its sequence (`importance`), A the advantage and sg[·] a stopped gradient:

    reinforce             −w · A · log π                                     w: sampled by another policy
    importance_weighted   −ρ · A
    clipped_surrogate     −min( ρ·A, clip(ρ)·A )                             PPO, GRPO, DAPO; GSPO by the sequence
    cispo                 −sg[min(ρ, 1 + ε)] · A · log π
    sapo                  −4/τ · σ(τ(ρ − 1)) · A
    vespo                 −sg[φ(W)] · A · log π                              W: ratio of the whole trajectory
    kl_penalized          −ρ · A + β · KL

Where ρ = W = 1, as on the first update after sampling, the gradient of each is −A · ∇log π (of kl_penalized only if KL
is the divergence from π_old, whose gradient is 0 there); they differ in what becomes of it as π moves away. Advantages
and weights are constants: no gradient flows into them. There is no mask: each position's loss depends on that position
alone, and a NaN or infinity at one that does not count makes its own loss or gradient NaN and no other's.
`loss_types.policy_loss` takes a mask and fills those positions first.
"""

import math

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_positive, require_same_shape


def reinforce(logprobs: Tensor, advantages: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The policy gradient itself, on-policy without weights and off-policy with them.

        loss = −w · A · log π

    For tokens drawn by another policy θ', w = p_θ(τ)/p_θ'(τ) (`importance.trajectory_log_weights`, clamped to
    ±LARGEST_LOG_RATIO and exponentiated) makes the expected gradient that of the on-policy loss. A baseline that does
    not depend on the action, taken off the return to make A, changes the variance only. The value of the loss means
    nothing.

    Args:
        logprobs: float [N, L].
        advantages: float [N, L], or [N, 1] for one per sequence.
        weights: float [N, L], or [N, 1] for one per sequence; None for 1.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit.
    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
    """
    advantages, logprobs = _fitted("advantages", advantages, logprobs), at_least_float32(logprobs)
    if weights is None:
        return -logprobs * advantages
    weights = _fitted("weights", weights, logprobs)
    return -torch.where(weights == 0, 0.0, logprobs) * advantages * weights  # a weight of 0 may be one of log π = −∞


def importance_weighted(ratios: Tensor, advantages: Tensor) -> Tensor:
    """The surrogate that PPO clips: loss = −ρ · A.

    At θ = θ_old its expected gradient is the policy gradient; further away a few large ratios dominate it.

    Args: as `clipped_surrogate`.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    return -at_least_float32(ratios) * _fitted("advantages", advantages, ratios)


def clipped_surrogate(
    ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float = math.inf
) -> Tensor:
    """PPO's clipped objective with bounds of its own on each side, as a loss per token (to be minimized).

        loss = −min( ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A )
        dual clip: where A < 0 the minimum is at least c·A

    The gradient is that of −ρ·A, except where `clip_indicators` says the clip is active: there it is 0. Lifting
    ε_high above ε_low lets unlikely tokens grow (DAPO). Sequence ratios (GSPO) go in as token ratios do.

    Without the dual clip a bad token that became much likelier has a loss that grows with ρ. TRL's `delta` is c, and
    the same loss for c ≥ 1 + ε_high; below that TRL also caps good tokens, here c is for bad ones, as in the paper.

    Args:
        ratios: float [N, L].
        advantages: float [N, L], or [N, 1] for one per sequence.
        clip_low, clip_high: ε_low and ε_high, ≥ 0; `math.inf` for no clip.
        dual_clip: c > 1; `math.inf` for none.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit, a bound is negative or dual_clip is not above 1.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 10;
        dual clip: Ye et al. 2019, arXiv:1912.09729, eq. 5.
    """
    _require_bounds(clip_low, clip_high, dual_clip)
    ratios, advantages = at_least_float32(ratios), _fitted("advantages", advantages, ratios)
    losses = -torch.minimum(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip == math.inf:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)


def clip_indicators(
    ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Where `clipped_surrogate` is flat: low where ρ < 1 − ε_low and A < 0, high where ρ > 1 + ε_high and A > 0.

    A dual clip counts as high, where ρ > c and A < 0; TRL leaves its own out of the count. Stable-Baselines3 counts
    every |ρ − 1| > ε, so also tokens whose gradient the clip does not touch.

    Args: as `clipped_surrogate`.
    Returns: low, high, bool [N, L]; their means over the mask are `clip_ratio/low_mean` and `clip_ratio/high_mean`.
    Raises: as `clipped_surrogate`.
    """
    _require_bounds(clip_low, clip_high, dual_clip)
    ratios, advantages = at_least_float32(ratios), _fitted("advantages", advantages, ratios)
    good, bad = advantages > 0, advantages < 0
    low = (ratios < 1 - clip_low) & bad
    high = ((ratios > 1 + clip_high) & good) | ((ratios > dual_clip) & bad)
    return low, high


def cispo(logprobs: Tensor, ratios: Tensor, advantages: Tensor, *, clip_high: float) -> Tensor:
    """CISPO: the importance weight is clipped, not the update, so that no token loses its gradient.

        loss = −sg[min(ρ, 1 + ε_high)] · A · log π

    The paper has a lower bound in its formula and leaves it off in its experiments; so does this. TRL reads its
    `epsilon_high` here as the cap itself: its recommended 5 is clip_high = 4, and its default of 0.2 there gives every
    token a fifth of its gradient, from the first update on.

    Args:
        logprobs, ratios: float [N, L].
        advantages: float [N, L], or [N, 1] for one per sequence.
        clip_high: ε_high ≥ 0; `math.inf` for no clip.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit or the bound is negative.
    Source: MiniMax 2025 (MiniMax-M1), arXiv:2506.13585, eq. 4 and 5.
    """
    _require_bounds(0.0, clip_high)
    return reinforce(logprobs, advantages, weights=at_least_float32(ratios).clamp(max=1 + clip_high))


def sapo(
    ratios: Tensor, advantages: Tensor, *, positive_temperature: float = 1.0, negative_temperature: float = 1.05
) -> Tensor:
    """SAPO: a smooth gate in place of the clip.

        loss = −4/τ · σ( τ(ρ − 1) ) · A,   τ = τ_positive where A > 0, else τ_negative

    Its slope in ρ is −A · sech²( τ(ρ − 1)/2 ): −A at ρ = 1, falling off on both sides, the faster the larger τ. The
    value at ρ = 1 is −2/τ · A, which says nothing. The defaults are the paper's.

    Args:
        ratios: float [N, L].
        advantages: float [N, L], or [N, 1] for one per sequence.
        positive_temperature, negative_temperature: > 0.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit or a temperature is not positive.
    Source: Gao et al. 2025, arXiv:2511.20347, eq. 5 and 6.
    """
    require_positive(positive_temperature=positive_temperature, negative_temperature=negative_temperature)
    ratios, advantages = at_least_float32(ratios), _fitted("advantages", advantages, ratios)
    temperatures = torch.full_like(advantages, negative_temperature)
    temperatures = temperatures.masked_fill(advantages > 0, positive_temperature)
    return -4 / temperatures * torch.sigmoid(temperatures * (ratios - 1)) * advantages


def vespo(
    logprobs: Tensor,
    log_weights: Tensor,
    advantages: Tensor,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """VESPO: a trajectory's gradient is scaled by a smooth function of its whole importance weight W = p_θ(τ)/p_μ(τ).

        loss = −sg[φ(W)] · A · log π,   φ(W) = W^k · exp( λ(1 − W) ),   one (k, λ) where A ≥ 0, another where A < 0

    φ(1) = 1; k dampens W < 1 and λ dampens W > 1, and neither end is a cliff. W is the product over the trajectory, not
    a mean, so it soon leaves 1 for long ones. μ is what sampled: weights against the sampler's log-probabilities
    include its mismatch, and the loss takes no other correction. The defaults are the paper's. TRL stops log W at
    −18.4 and 20 and each token's at ±20; here nothing stops, for φ goes to 0 at both ends.

    Args:
        logprobs: float [N, L].
        log_weights: float [N], log W, see `importance.trajectory_log_weights`.
        advantages: float [N, L], or [N, 1] for one per sequence.
        positive, negative: (k, λ) where A ≥ 0 and where A < 0, each > 0.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit or a k or λ is not positive.
    Source: Shen et al. 2026, arXiv:2602.10693, eq. 20.
    """
    for name, numbers in (("positive", positive), ("negative", negative)):
        require_positive(**{f"{name} {place}": number for place, number in zip(("k", "λ"), numbers, strict=True)})
    log_weights = _fitted("log_weights", log_weights.unsqueeze(-1), logprobs)
    excess = torch.expm1(log_weights)  # W − 1; infinite where φ is 0
    kernels = [(power * log_weights - decay * excess).exp() for power, decay in (positive, negative)]
    bad = _fitted("advantages", advantages, logprobs) < 0
    return reinforce(logprobs, advantages, weights=torch.where(bad, kernels[1], kernels[0]))


def kl_penalized(ratios: Tensor, advantages: Tensor, divergences: Tensor, *, kl_coefficient: float) -> Tensor:
    """PPO's other objective, a price on moving instead of a clip: loss = −ρ · A + β · KL.

    The paper adapts β to keep KL(π_old ‖ π) near a target. Which divergence this is, and which gradient it has, is up
    to what is passed: an exact one per position, or an estimate that is good as a loss (`kl`).

    Args:
        ratios: float [N, L].
        advantages: float [N, L], or [N, 1] for one per sequence.
        divergences: float [N, L], with their gradient.
        kl_coefficient: β ≥ 0.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit or the coefficient is negative.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 8.
    """
    if not kl_coefficient >= 0:
        raise ValueError(f"kl_coefficient is {kl_coefficient}, expected at least 0")
    require_same_shape(ratios=ratios, divergences=divergences)
    return importance_weighted(ratios, advantages) + kl_coefficient * at_least_float32(divergences)


def _fitted(name: str, constants: Tensor, tokens: Tensor) -> Tensor:
    """Numbers per token, or per sequence, in the shape of the tokens and without gradient."""
    if constants.dim() == tokens.dim() == 2 and constants.shape[1] == 1:
        constants = constants.expand(-1, tokens.shape[1])
    require_same_shape(**{"tokens": tokens, name: constants})
    return at_least_float32(constants.detach())


def _require_bounds(clip_low: float, clip_high: float, dual_clip: float = math.inf) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low is {clip_low} and clip_high is {clip_high}, expected both to be at least 0")
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}, expected more than 1")
