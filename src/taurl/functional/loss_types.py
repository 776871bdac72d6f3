"""Policy losses by the names that TRL's `loss_type` has: which surrogate, which aggregation, which ratio.

A name is a line of `LOSS_TYPES` and no code of its own. A trainer calls

    weights = loss_weights(loss_type, mask, max_tokens=…)                            # whole optimiser batch
    losses = policy_loss(loss_type, logprobs, old_logprobs, advantages, mask, …)     # any part of it
    loss = weighted_sum(losses, weights[rows])

`bnpo` is in TRL the one that divides by the tokens of the micro-batch at hand, so that its result depends on how the
batch was cut. Here a denominator belongs to the whole optimiser batch, and bnpo equals dapo.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_mask
from taurl.functional.aggregation import Aggregation, token_weights
from taurl.functional.importance import (
    sequence_ratios,
    sequence_token_ratios,
    token_ratios,
    trajectory_log_weights,
)
from taurl.functional.surrogates import cispo, clip_indicators, clipped_surrogate, sapo, vespo

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
RatioLevel = Literal["token", "sequence", "sequence_token"]


class LossDefinition(NamedTuple):
    """One line of the table.

    surrogate: "clip" is `surrogates.clipped_surrogate`, the others go by their names.
    aggregation: what each token counts, see `aggregation.token_weights`.
    ratio_level: that of the paper; others are experiments. None: the surrogate takes no ratio.
    meaning: one sentence, for the pages.
    clip_high: ε_high unless told otherwise.
    """

    surrogate: Literal["clip", "cispo", "sapo", "vespo"]
    aggregation: Aggregation
    ratio_level: RatioLevel | None
    meaning: str
    clip_high: float = 0.2


LOSS_TYPES: dict[LossType, LossDefinition] = {
    # Shao et al. 2024, arXiv:2402.03300, eq. 3; with ratio "sequence" GSPO, arXiv:2507.18071, eq. 5.
    "grpo": LossDefinition(
        "clip", "sequence", "token", "PPO's clip, every sequence counts the same: tokens of short ones count more"
    ),
    # Liu et al. 2025, arXiv:2503.20783, section 3.2.
    "dr_grpo": LossDefinition(
        "clip", "constant", "token", "PPO's clip, divided by the most tokens allowed: no preference for a length"
    ),
    # Yu et al. 2025, arXiv:2503.14476, eq. 8, there within one group.
    "dapo": LossDefinition("clip", "token", "token", "PPO's clip, every token of the batch counts the same"),
    # A name of TRL's.
    "bnpo": LossDefinition("clip", "token", "token", "the same as dapo, which here is the same for any micro-batch"),
    # MiniMax 2025, arXiv:2506.13585, eq. 4.
    "cispo": LossDefinition(
        "cispo",
        "token",
        "token",
        "the importance weight is clipped instead of the update: no token loses its gradient",
        clip_high=4.0,  # a cap of 5, TRL's recommendation
    ),
    # Gao et al. 2025, arXiv:2511.20347, eq. 5.
    "sapo": LossDefinition("sapo", "sequence", "token", "a smooth gate about ratio 1 in place of the clip"),
    # Liu et al. 2026, arXiv:2602.05261. TRL leaves its ratio at "token" unless told, and warns.
    "luspo": LossDefinition(
        "clip", "sum", "sequence", "GSPO's clip of whole sequences, each counting by its length; large: lower the rate"
    ),
    # Shen et al. 2026, arXiv:2602.10693, eq. 20. The equation sums over a trajectory's tokens; dividing by the tokens
    # of the batch, as TRL does, changes that by one number per batch.
    "vespo": LossDefinition(
        "vespo", "token", None, "each sequence scaled by a smooth function of its whole importance weight"
    ),
}


def loss_weights(loss_type: LossType, mask: Tensor, *, max_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each token's loss counts, by the loss type's aggregation: `aggregation.token_weights` of the whole batch.

    Args:
        mask: bool [N, L], of the whole optimiser batch.
        max_tokens: the most tokens a completion may have; dr_grpo divides by it.
        dtype: of the weights.
    Returns: weights [N, L], 0 where masked.
    Raises: ValueError if the loss type is unknown, and as `token_weights`.
    """
    how = _definition(loss_type).aggregation
    return token_weights(mask, how, length=max_tokens if how == "constant" else None, dtype=dtype)


def policy_loss(
    loss_type: LossType,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio_level: RatioLevel | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = math.inf,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo_kernels: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0)),
) -> Tensor:
    """The loss of each token. Rows do not mix, so any part of a batch can be computed alone.

    Where the ratio is 1 (`logprobs.detach()` given as old, on the first update after sampling) the gradient by a
    token's log-probability is −A for every loss type, without a factor; for a sequence's ratio, −A averaged over the
    row.

    Two clips differ from TRL's: cispo caps the weight at 1 + clip_high as its paper does, TRL at `epsilon_high`; vespo
    takes the sampler's log-probabilities as old ones, so that its weight contains the mismatch of the sampler and no
    other correction follows, where TRL folds in the truncated one.

    Args:
        loss_type: a name of `LOSS_TYPES`.
        logprobs, old_logprobs: float [N, L]; no gradient into the old ones.
        advantages: float [N, L], or [N, 1] for one per sequence.
        mask: bool [N, L]; masked positions may hold anything, have loss 0 and get no gradient.
        ratio_level: of the importance ratio; None for the loss type's own. Not for vespo.
        clip_low, clip_high, dual_clip: see `surrogates.clipped_surrogate`; clip_high also for `surrogates.cispo`. None:
            the loss type's own, 0.2, and 4 for cispo. Where the surrogate has no clip they are not read, and a finite
            dual_clip is refused.
        sapo_temperatures: where A > 0 and where A ≤ 0.
        vespo_kernels: (k, λ) where A ≥ 0 and where A < 0.
    Returns: loss, [N, L]; float32, or float64 for float64.
    Raises: ValueError if shapes do not fit, the mask is not boolean, a name is unknown or a number is out of range.
    """
    surrogate, level, clip_high = _options(loss_type, ratio_level, clip_high, dual_clip)
    logprobs, old_logprobs, advantages = _filled(logprobs, old_logprobs, advantages, mask)
    if level is None:
        log_weights = trajectory_log_weights(logprobs, old_logprobs, mask)
        return vespo(logprobs, log_weights, advantages, positive=vespo_kernels[0], negative=vespo_kernels[1])
    ratios = _ratios(level, logprobs, old_logprobs, mask)
    if surrogate == "cispo":
        return cispo(logprobs, ratios, advantages, clip_high=clip_high)
    if surrogate == "sapo":
        positive, negative = sapo_temperatures
        return sapo(ratios, advantages, positive_temperature=positive, negative_temperature=negative)
    return clipped_surrogate(ratios, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def clipped_tokens(
    loss_type: LossType,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio_level: RatioLevel | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Where `policy_loss` clips, low and high, for the logs.

    PPO's clip: where the token has no gradient (`surrogates.clip_indicators`). cispo: high where the weight is capped,
    whatever the sign of A, for there it is capped too; TRL counts A > 0 only. sapo and vespo clip nowhere.

    Args, Raises: as `policy_loss`.
    Returns: low, high, bool [N, L], False where masked.
    """
    surrogate, level, clip_high = _options(loss_type, ratio_level, clip_high, dual_clip)
    logprobs, old_logprobs, advantages = _filled(logprobs.detach(), old_logprobs, advantages, mask)
    nowhere = torch.zeros_like(mask)
    if level is None or surrogate == "sapo":
        return nowhere, nowhere
    ratios = _ratios(level, logprobs, old_logprobs, mask)
    if surrogate == "cispo":
        return nowhere, mask & (ratios > 1 + clip_high)  # a row's ratio stands at its masked positions too
    return clip_indicators(ratios, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def _definition(loss_type: LossType) -> LossDefinition:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
    return LOSS_TYPES[loss_type]


def _filled(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All [N, L], widened, and 0 where masked: ratio 1 and loss 0 there, and nothing reaches a value or a gradient."""
    if advantages.dim() == 2 and advantages.shape[1] == 1:
        advantages = advantages.expand(-1, mask.shape[-1])
    require_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = (
        torch.where(mask, at_least_float32(tensor), 0.0)
        for tensor in (logprobs, old_logprobs.detach(), advantages.detach())
    )
    return logprobs, old_logprobs, advantages


def _options(
    loss_type: LossType, ratio_level: RatioLevel | None, clip_high: float | None, dual_clip: float
) -> tuple[str, RatioLevel | None, float]:
    """Surrogate, level and ε_high, the loss type's own where not given."""
    own = _definition(loss_type)
    if ratio_level is not None and own.ratio_level is None:
        raise ValueError(f"ratio_level is {ratio_level!r}, expected none: {loss_type} weighs whole trajectories")
    if ratio_level not in (None, *get_args(RatioLevel)):
        raise ValueError(f"ratio_level is {ratio_level!r}, expected one of {', '.join(get_args(RatioLevel))}")
    if dual_clip != math.inf and own.surrogate != "clip":
        raise ValueError(f"dual_clip is {dual_clip}, but {loss_type} does not clip: leave it out")
    return own.surrogate, ratio_level or own.ratio_level, own.clip_high if clip_high is None else clip_high


def _ratios(level: RatioLevel, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    match level:
        case "token":
            return token_ratios(logprobs, old_logprobs)
        case "sequence":
            return sequence_ratios(logprobs, old_logprobs, mask)
        case "sequence_token":
            return sequence_token_ratios(logprobs, old_logprobs, mask)
