"""Advantages: how much better a sample did than what it is compared with."""

from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["group", "none", "batch"]


def has_variance(rewards: Tensor) -> Tensor:
    """Which groups carry a signal: at least two rewards that differ.

    The others have advantage 0 everywhere, so a caller without a KL or entropy term need not forward them.

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
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}, expected a positive number")
    signal = has_variance(rewards)[:, None] & ~rewards.isnan()
    exact = rewards.detach().double()  # a few numbers, so squares of large float32 rewards may as well not overflow
    centred = torch.where(signal, exact - exact.nanmean(1, keepdim=True), 0.0)
    match scale:
        case "group":
            count = (~rewards.isnan()).sum(1, keepdim=True)
            centred /= _unbiased_std(centred.square().sum(1, keepdim=True), count) + epsilon
        case "batch":
            valid = exact[~exact.isnan()]
            deviations = valid - valid.mean()
            centred /= _unbiased_std(deviations.square().sum(), torch.tensor(valid.numel())) + epsilon
        case "none":
            pass
        case _:
            raise ValueError(f"scale is {scale!r}, expected 'group', 'none' or 'batch'")
    return centred.to(torch.promote_types(rewards.dtype, torch.float32))


def _unbiased_std(sum_of_squares: Tensor, count: Tensor) -> Tensor:
    return (sum_of_squares / (count - 1).clamp(min=1)).sqrt()


def _require_rewards(rewards: Tensor) -> None:
    if rewards.dim() != 2 or not rewards.shape[1] or not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype} {list(rewards.shape)}, expected floats [prompts, group]")
    if rewards.isinf().any():
        row, column = rewards.isinf().nonzero()[0].tolist()
        raise ValueError(f"rewards[{row}, {column}] is {rewards[row, column].item()}, expected a finite number or NaN")
