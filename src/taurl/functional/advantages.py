"""Advantages: how much better a sample did than what it is compared with.

    function              compared with (the baseline)           divided by                       method
    group_relative        the mean of its group                  std of group, of batch, nothing  GRPO, Dr. GRPO
    leave_one_out         the mean of the others in its group    nothing                          RLOO
    greedy_baseline       the greedy completion's reward         nothing                          ReMax
    reinforce_plus_plus   the mean of the batch, or of its group std of the batch                 REINFORCE++
    sum_then_normalize    as group_relative, of Σ_k w_k r_k                                       GRPO, several rewards
    normalize_then_sum    each reward's mean of its group        std of group, then of batch      GDPO
    whiten                the mean of all                        std of all                       PPO, any advantages

A baseline that does not depend on the sample leaves the policy gradient unbiased: leave_one_out, greedy_baseline. The
group's mean contains the sample and shrinks the gradient to (G − 1)/G of it; a standard deviation of the same samples
biases it.

Everything here is computed once over the whole optimiser batch. A standard deviation is the unbiased one (n − 1) plus
ε = 1e-4, as in TRL; it is 0 for fewer than two numbers. A reward of NaN (none applies) counts in no mean, std or number
of rewards, and its advantage is 0, as in TRL 1.16. Advantages carry no gradient.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from taurl.functional._inputs import require_positive, require_same_shape

AdvantageScale = Literal["group", "none", "batch"]


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

    A reward of NaN (none applies) counts in no mean and no std, and its advantage is 0. A group of one, or whose
    rewards are all equal, has advantage 0. The result is finite. `rewards` is the whole optimiser batch: "batch"
    cannot be computed from a part of it.

    Args:
        rewards: float [P, G], P prompts with G completions each.
        epsilon: ε > 0.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if rewards are not float [P, G], one is infinite, epsilon is not positive or scale is unknown.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; "none": Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    require_positive(epsilon=epsilon)
    centred, valid = _centred(rewards), ~rewards.isnan()
    match scale:
        case "group":
            centred /= _unbiased_std(centred, valid.sum(1, keepdim=True)) + epsilon
        case "batch":
            centred /= whitening_statistics(rewards, valid)[1] + epsilon
        case "none":
            pass
        case _:
            raise ValueError(f"scale is {scale!r}, expected 'group', 'none' or 'batch'")
    return _with_precision_of(rewards, centred)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each completion's reward against the mean of the others in its group (RLOO).

        A_pg = r_pg − 1/(n − 1) · Σ_{h ≠ g} r_ph  =  n/(n − 1) · (r_pg − mean_g r_pg),   n the rewards of group p

    The baseline does not contain r_pg, so the policy gradient stays unbiased. A group of one has nothing to compare
    with, and advantage 0; so has a group whose rewards are all equal. To normalise these over the batch too, an
    option of TRL, `whiten(leave_one_out(rewards), ~rewards.isnan())`.

    Args:
        rewards: float [P, G]; NaN where none applies.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if rewards are not float [P, G] or one is infinite.
    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024,
        arXiv:2402.14740.
    """
    centred = _centred(rewards)
    count = (~rewards.isnan()).sum(1, keepdim=True).double()
    return _with_precision_of(rewards, centred * count / (count - 1).clamp(min=1))


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
    return _with_precision_of(rewards, torch.where(difference.isnan(), 0.0, difference))


def reinforce_plus_plus(rewards: Tensor, *, group_baseline: bool = False, epsilon: float = 1e-4) -> Tensor:
    """Advantages normalised over the whole batch and not over a group (REINFORCE++).

        A_pg = (a_pg − mean_pg a_pg) / (std_pg a_pg + ε),   a_pg = r_pg                     plain: G may be 1
                                                                   r_pg − mean_g r_pg       with group_baseline

    A handful of samples makes a poor standard deviation, and one that depends on each of them; a batch's hardly does.
    With the group's baseline the second mean is 0. `group_relative(scale="batch")` subtracts the same but divides by
    the std of the rewards themselves, which how the prompts differ enters too. One number a completion: where a KL
    penalty in the reward makes the advantages differ from token to token, `whiten` those.

    Args:
        rewards: float [P, G], the whole optimiser batch; NaN where none applies.
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
    return _with_precision_of(rewards, _divided_by_batch_std(_centred(rewards), valid, epsilon))


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
    return _with_precision_of(rewards, group_relative(total, scale=scale, epsilon=epsilon))


def normalize_then_sum(rewards: Tensor, weights: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """Several rewards: each normalised in its group, then their weighted sum, then the batch's scale (GDPO).

        A_pgk = (r_pgk − mean_g r_pgk) / (std_g r_pgk + ε)
        S_pg  = Σ_k w_k · A_pgk
        A_pg  = S_pg / (std_pg S_pg + ε)          the mean of S over the batch is 0

    Normalising the sum instead gives a group that differs in one reward and a group that differs in both the same
    advantages, and lets the reward with the widest range drown the others. The last step keeps the scale from growing
    with K. A reward that does not apply (NaN) is compared with nothing and adds 0; a completion to which none applies
    does not count in the batch's std.

    Args:
        rewards: float [P, G, K], the whole optimiser batch.
        weights: float [K], w.
        epsilon: ε > 0.
    Returns: advantages, [P, G], detached; float32, or float64 for float64 rewards.
    Raises: ValueError if shapes or dtypes do not fit, a number is infinite or epsilon is not positive.
    Source: Liu et al. 2026, arXiv:2601.05242.
    """
    exact, weights = _several(rewards, weights)
    each = torch.stack([group_relative(reward, epsilon=epsilon) for reward in exact.unbind(2)], 2)
    total = (each * weights).sum(2)
    return _with_precision_of(rewards, _divided_by_batch_std(total, ~exact.isnan().all(2), epsilon))


def whitening_statistics(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the values that count, for `whiten` to apply part by part.

    Equal values have a std of exactly 0, and so has a single one; nothing at all has mean 0 and std 0.

    Args:
        values: float of any shape, the whole optimiser batch; anything where masked.
        mask: bool of that shape, the values that count; by default all.
    Returns: mean, std, both [], float64, detached.
    Raises: ValueError if shapes or dtypes do not fit or a value that counts is NaN or infinite.
    """
    counted = values.detach()[_mask_for(values, mask)].double()  # so squares and long sums of float32 stay exact
    if not counted.isfinite().all():
        found = int((~counted.isfinite()).sum())
        raise ValueError(
            f"{found} of {counted.numel()} values are NaN or infinite, expected finite ones where they count"
        )
    if not counted.numel():
        return counted.sum(), counted.sum()
    # The mean of equal floats may be off by a rounding: it lies between the smallest and the largest.
    mean = counted.mean().clamp(counted.amin(), counted.amax())
    return mean, _unbiased_std((counted - mean)[None], torch.tensor(counted.numel()))[0, 0]


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    statistics: tuple[Tensor, Tensor] | None = None,
    shift_mean: bool = True,
    epsilon: float = 1e-4,
) -> Tensor:
    """Values with mean 0 and standard deviation 1 over all that count.

        y = (x − μ) / (σ + ε)          shift_mean
            (x − μ) / (σ + ε) + μ      otherwise: the mean stays where it was

    For the advantages of PPO, per step or per token, and, with the mean kept, for its rewards. The statistics are
    those of the whole optimiser batch, given or taken from `values`: whitening each micro-batch by its own would make
    the gradient depend on the split. A single value, and values that are all equal, give exactly 0 (or μ).

    Stable-Baselines3 whitens each minibatch by itself, with ε = 1e-8, and leaves a batch of one as it is. Here ε is
    1e-4 as in all of this file: noise with a std far below that is not blown up to 1.

    Args:
        values: float of any shape; anything where masked.
        mask: bool of that shape; by default all count.
        statistics: what `whitening_statistics` gave of the whole batch, for a part of it; by default those of `values`.
        epsilon: ε > 0.
    Returns: whitened values of that shape, 0 where masked, detached; float32, or float64 for float64.
    Raises: ValueError if shapes or dtypes do not fit, epsilon is not positive, or as `whitening_statistics` does.
    """
    require_positive(epsilon=epsilon)
    counts = _mask_for(values, mask)
    mean, std = whitening_statistics(values, counts) if statistics is None else statistics
    whitened = (values.detach().double() - mean) / (std + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return _with_precision_of(values, torch.where(counts, whitened, 0.0))


def _centred(rewards: Tensor) -> Tensor:
    """Float64 deviations from the group's mean; exactly 0 where there is no reward or the group has no variance."""
    signal = has_variance(rewards)[:, None] & ~rewards.isnan()
    exact = rewards.detach().double()  # a few numbers, so sums of large float32 rewards may as well not overflow
    return torch.where(signal, exact - exact.nanmean(1, keepdim=True), 0.0)


def _unbiased_std(deviations: Tensor, count: Tensor) -> Tensor:
    """√( Σ d² / (count − 1) ) along dimension 1, which is kept; deviations are 0 where nothing counts."""
    if not deviations.numel():
        return deviations.sum(1, keepdim=True)
    # The largest is taken out of the root, so that no square overflows or vanishes.
    largest = deviations.abs().amax(1, keepdim=True).clamp(min=torch.finfo(deviations.dtype).tiny)
    squares = (deviations / largest).square().sum(1, keepdim=True)
    return largest * (squares / (count - 1).clamp(min=1)).sqrt()


def _divided_by_batch_std(centred: Tensor, valid: Tensor, epsilon: float) -> Tensor:
    """Numbers whose mean over the batch is 0, as every group's is, over their std; only valid ones are counted."""
    require_positive(epsilon=epsilon)
    return centred / (_unbiased_std(centred.flatten()[None], valid.sum()) + epsilon)


def _with_precision_of(given: Tensor, result: Tensor) -> Tensor:
    return result.to(torch.promote_types(given.dtype, torch.float32))


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


def _require_no_infinity(name: str, tensor: Tensor) -> None:
    if tensor.isinf().any():
        place = tensor.isinf().nonzero()[0].tolist()
        raise ValueError(f"{name}{place} is {tensor[tuple(place)].item()}, expected a finite number or NaN")


def _mask_for(values: Tensor, mask: Tensor | None) -> Tensor:
    if not values.is_floating_point():
        raise ValueError(f"values are {values.dtype}, expected floats")
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected booleans; pass mask.bool()")
    require_same_shape(values=values, mask=mask)
    return mask
