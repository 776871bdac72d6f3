"""Advantages: how much better a sample did than what it is compared with.

    function              compared with (the baseline)           divided by                       method
    group_relative        the mean of its group                  std of group, of batch, nothing  GRPO, Dr. GRPO
                                                                 that mean                        MaxRL
    leave_one_out         the mean of the others in its group    nothing                          RLOO
    greedy_baseline       the greedy completion's reward         nothing                          ReMax
    reinforce_plus_plus   the mean of the batch, or of its group std of the batch                 REINFORCE++
    sum_then_normalize    as group_relative, of Σ_k w_k r_k                                       GRPO, several rewards
    normalize_then_sum    each reward's mean of its group        std of group, then of batch      GDPO

`whitening.whiten` compares any advantages with their mean, as PPO does.

A baseline that does not depend on the sample leaves the policy gradient unbiased: leave_one_out, greedy_baseline. The
group's mean contains the sample and shrinks the gradient to (G − 1)/G of it; a standard deviation of the same samples
biases it.

Everything here is computed once over the whole optimizer batch. A standard deviation is the unbiased one (n − 1) plus
ε = 1e-4, as in TRL; it is 0 for fewer than two numbers. A reward of NaN (none applies) counts in no mean, std or number
of rewards, and its advantage is 0, as in TRL 1.16. Advantages carry no gradient.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from taurl.functional._deviation import unbiased_std
from taurl.functional._inputs import require_positive, with_precision_of
from taurl.functional.whitening import whiten, whitening_statistics

AdvantageScale = Literal["group", "none", "batch", "mean"]


def has_variance(rewards: Tensor) -> Tensor:
    """Which groups carry a signal: at least two rewards that differ.

    The others have a group-relative and a leave-one-out advantage of 0 everywhere, so a caller without a KL or entropy
    term need not forward them. Not so with the baselines of `greedy_baseline` and plain `reinforce_plus_plus`.

    Args:
        rewards: float [P, G]; NaN where no reward applies.
    Returns: bool [P].
    Raises: ValueError if rewards are not float [P, G] or one is infinite.
    """
    _require_rewards(rewards)
    absent = rewards.isnan()
    # Compared and not computed: the mean of equal floats may be off by a rounding, which a small std would blow up.
    return rewards.masked_fill(absent, -torch.inf).amax(1) > rewards.masked_fill(absent, torch.inf).amin(1)


def group_relative(rewards: Tensor, *, scale: AdvantageScale = "group", epsilon: float = 1e-4) -> Tensor:
    """Each completion's reward against the mean of its group, the completions of the same prompt.

        A_pg = (r_pg − mean_g r_pg) / s

        s = std_g r_pg + ε   "group", GRPO; the std is the unbiased one (G − 1), as in TRL
            1                "none", Dr. GRPO: dividing by the std favours questions nearly always or never solved
            std_pg r_pg + ε  "batch": over all rewards of the batch, about their common mean
            mean_g r_pg      "mean", MaxRL, for rewards of 0 or 1 (none may be negative)

    "none" climbs Σ_p P(right), P the probability of a right answer, and "mean" nearly Σ_p log P(right), as supervised
    learning of all right answers would: a question rarely solved weighs more. Exactly, since log P = −Σ_k (1 − P)^k / k
    and (1 − P)^k is the chance that k answers fail, its expected gradient is that of the first G − 1 terms.

    A reward of NaN (none applies) counts in no mean and no std, and its advantage is 0. A group of one, or whose
    rewards are all equal, has advantage 0. Differences of rewards must fit their dtype. `rewards` is the whole
    optimizer batch: "batch" cannot be computed from a part of it.

    Args:
        rewards: float [P, G], P prompts with G completions each.
        epsilon: ε > 0.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if rewards are not float [P, G], one is infinite or, for "mean", negative, epsilon is not
        positive or scale is unknown.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; "none": Liu et al. 2025, arXiv:2503.20783, section 3.2;
        "mean": Tajwar et al. 2026, arXiv:2602.02710, algorithm 1.
    """
    require_positive(epsilon=epsilon)
    centered, valid = _centered(rewards), ~rewards.isnan()
    match scale:
        case "group":
            centered /= unbiased_std(centered, valid.sum(1, keepdim=True)) + epsilon
        case "batch":
            centered /= whitening_statistics(rewards, valid)[1] + epsilon
        case "mean":
            _require_no_negative(rewards)
            mean = rewards.detach().double().nanmean(1, keepdim=True)
            centered /= mean.where(mean > 0, 1.0)  # without a reward above 0 nothing is divided
        case "none":
            pass
        case _:
            raise ValueError(f"scale is {scale!r}, expected 'group', 'none', 'batch' or 'mean'")
    return with_precision_of(rewards, centered)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each completion's reward against the mean of the others in its group (RLOO).

        A_pg = r_pg − 1/(n − 1) · Σ_{h ≠ g} r_ph  =  n/(n − 1) · (r_pg − mean_g r_pg),   n the rewards of group p

    The baseline does not contain r_pg, so the policy gradient stays unbiased. A group of one has nothing to compare
    with, and advantage 0; so has a group whose rewards are all equal. To normalize these over the batch too, an
    option of TRL, `whiten(leave_one_out(rewards), ~rewards.isnan())`.

    Args:
        rewards: float [P, G]; NaN where none applies.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if rewards are not float [P, G] or one is infinite.
    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024,
        arXiv:2402.14740.
    """
    centered = _centered(rewards)
    count = (~rewards.isnan()).sum(1, keepdim=True).double()
    return with_precision_of(rewards, centered * count / (count - 1).clamp(min=1))


def greedy_baseline(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Each completion's reward against that of the greedy completion of the same prompt (ReMax).

        A_pg = r_pg − b_p,   b_p the reward of the completion that takes the likeliest token at every step

    It works with one sample a prompt, at the price of generating and scoring one more. Where either reward is NaN the
    advantage is 0.

    Args:
        rewards: float [P, G].
        greedy_rewards: float [P].
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if shapes or dtypes do not fit or a reward is infinite.
    Source: Li et al. 2023, arXiv:2310.10505.
    """
    _require_rewards(rewards)
    if greedy_rewards.shape != rewards.shape[:1] or not greedy_rewards.is_floating_point():
        found = f"{greedy_rewards.dtype} {list(greedy_rewards.shape)}"
        raise ValueError(f"greedy_rewards are {found}, expected floats [{len(rewards)}], one for each prompt")
    _require_no_infinity("greedy_rewards", greedy_rewards)
    difference = rewards.detach().double() - greedy_rewards.detach().double()[:, None]
    return with_precision_of(rewards, torch.where(difference.isnan(), 0.0, difference))


def reinforce_plus_plus(rewards: Tensor, *, group_baseline: bool = False, epsilon: float = 1e-4) -> Tensor:
    """Advantages normalized over the whole batch and not over a group (REINFORCE++).

        A_pg = (a_pg − mean_pg a_pg) / (std_pg a_pg + ε),   a_pg = r_pg                     plain: G may be 1
                                                                   r_pg − mean_g r_pg       with group_baseline

    A handful of samples makes a poor standard deviation, and one that depends on each of them; a batch's hardly does.
    With the group's baseline the second mean is 0. `group_relative(scale="batch")` subtracts the same, but divides by
    the std of the rewards themselves, which is the larger the more the prompts differ in difficulty. There is one
    number for each completion; where a KL penalty in the reward makes the advantages differ from token to token,
    `whiten` them.

    Args:
        rewards: float [P, G], the whole optimizer batch; NaN where none applies.
        group_baseline: subtract the group's mean first; a group without variance then has advantage exactly 0.
        epsilon: ε > 0.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if rewards are not float [P, G], one is infinite or epsilon is not positive.
    Source: Hu et al. 2025, arXiv:2501.03262.
    """
    _require_rewards(rewards)
    valid = ~rewards.isnan()
    if not group_baseline:
        return whiten(rewards, valid, epsilon=epsilon)
    return with_precision_of(rewards, _divided_by_batch_std(_centered(rewards), valid, epsilon))


def sum_then_normalize(
    rewards: Tensor, weights: Tensor, *, scale: AdvantageScale = "group", epsilon: float = 1e-4
) -> Tensor:
    """Several rewards: their weighted sum, then `group_relative`.

        A = group_relative( Σ_k w_k · r_pgk )

    A reward that does not apply (NaN) is left out of its completion's sum; a completion to which none applies has
    advantage 0. Where a reward applies to only some of a group, sums of different terms are compared:
    `normalize_then_sum` does not.

    Args:
        rewards: float [P, G, K], K rewards for each completion.
        weights: float [K], w.
        scale, epsilon: as in `group_relative`.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if shapes or dtypes do not fit, a number is infinite, or as `group_relative` does.
    """
    exact, weights = _several(rewards, weights)
    applies = ~exact.isnan()
    total = torch.where(applies, exact * weights, 0.0).sum(2).masked_fill(~applies.any(2), math.nan)
    return with_precision_of(rewards, group_relative(total, scale=scale, epsilon=epsilon))


def normalize_then_sum(rewards: Tensor, weights: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """Several rewards: each normalized in its group, then their weighted sum, then the batch's scale (GDPO).

        A_pgk = (r_pgk − mean_g r_pgk) / (std_g r_pgk + ε)
        S_pg  = Σ_k w_k · A_pgk
        A_pg  = S_pg / (std_pg S_pg + ε)          the mean of S over the batch is 0

    Normalizing the sum instead gives a group that differs in one reward and a group that differs in both the same
    advantages, and lets the reward with the widest range drown the others. The last step keeps the scale from growing
    with K. A reward that does not apply (NaN) is compared with nothing and adds 0; a completion to which none applies
    does not count in the batch's std.

    Args:
        rewards: float [P, G, K], the whole optimizer batch.
        weights: float [K], w.
        epsilon: ε > 0.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if shapes or dtypes do not fit, a number is infinite or epsilon is not positive.
    Source: Liu et al. 2026, arXiv:2601.05242.
    """
    exact, weights = _several(rewards, weights)
    each = torch.stack([group_relative(reward, epsilon=epsilon) for reward in exact.unbind(2)], 2)
    total = (each * weights).sum(2)
    return with_precision_of(rewards, _divided_by_batch_std(total, ~exact.isnan().all(2), epsilon))


def _centered(rewards: Tensor) -> Tensor:
    """Float64 deviations from the group's mean; exactly 0 where there is no reward or the group has no variance."""
    signal = has_variance(rewards)[:, None] & ~rewards.isnan()
    exact = rewards.detach().double()  # a few numbers, so sums of large float32 rewards may as well not overflow
    return torch.where(signal, exact - exact.nanmean(1, keepdim=True), 0.0)


def _divided_by_batch_std(centered: Tensor, valid: Tensor, epsilon: float) -> Tensor:
    """Numbers whose mean over the batch is 0, as every group's is, over their std; only valid ones are counted."""
    require_positive(epsilon=epsilon)
    return centered / (unbiased_std(centered.flatten()[None], valid.sum()) + epsilon)


def _several(rewards: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [P, G, K] and weights [K] in float64, checked."""
    fits = rewards.dim() == 3 and rewards.shape[1] and rewards.shape[2] and weights.shape == rewards.shape[2:]
    if not fits or not (rewards.is_floating_point() and weights.is_floating_point()):
        found = f"{rewards.dtype} {list(rewards.shape)} and weights {weights.dtype} {list(weights.shape)}"
        raise ValueError(f"rewards are {found}, expected floats [prompts, group, rewards] and [rewards]")
    if not weights.isfinite().all():
        raise ValueError(f"weights are {weights.tolist()}, expected finite numbers")
    _require_no_infinity("rewards", rewards)
    return rewards.detach().double(), weights.detach().to(rewards.device).double()


def _require_rewards(rewards: Tensor) -> None:
    if rewards.dim() != 2 or not rewards.shape[1] or not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype} {list(rewards.shape)}, expected floats [prompts, group]")
    _require_no_infinity("rewards", rewards)


def _require_no_negative(rewards: Tensor) -> None:
    if (rewards < 0).any():
        place = (rewards < 0).nonzero()[0].tolist()
        raise ValueError(f"rewards{place} is {rewards[tuple(place)].item()}, expected 0 or more for scale 'mean'")


def _require_no_infinity(name: str, tensor: Tensor) -> None:
    if tensor.isinf().any():
        place = tensor.isinf().nonzero()[0].tolist()
        raise ValueError(f"{name}{place} is {tensor[tuple(place)].item()}, expected a finite number or NaN")
