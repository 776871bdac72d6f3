"""From one loss per token to one number, so that it does not matter how the batch is cut.

The weight of each token is fixed once, over the whole optimizer batch, before any micro-batch runs; a part's loss is
a weighted sum, and the parts' losses and gradients add up to the whole batch's:

    weights = token_weights(mask, "token")                       # whole batch [N, L]
    for rows in parts:
        weighted_sum(loss_of(rows), weights[rows]).backward()

A loss that is one number per row (a preference pair, a sequence) goes the same way with `row_weights`.
"""

from typing import Literal

import torch
from torch import Tensor

from taurl.functional._inputs import require_mask, require_same_shape

Aggregation = Literal["token", "sequence", "sum", "constant"]


def token_weights(
    mask: Tensor, how: Aggregation, *, length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What each token's loss counts in the loss of the whole optimizer batch.

        how         weight             mean over …                           method, TRL's loss_type
        "token"     1 / Σ_i |o_i|      all tokens                            DAPO: dapo, bnpo, cispo, vespo
        "sequence"  1 / (n · |o_i|)    sequences, of their tokens' mean      GRPO, GSPO: grpo, sapo
        "sum"       1 / n              sequences, of their tokens' sum       REINFORCE, RLOO, LUSPO: luspo
        "constant"  1 / (n · length)   sequences, of their sum over length   Dr. GRPO: dr_grpo

    Only "sum", and "constant" up to its factor, make the gradient of Σ A · log π that of the expected reward; the
    other two depend on how long the samples happened to be. A loss of one number per sequence that stands at each of
    its tokens is under "sequence" the mean over sequences (GSPO), under "sum" weighted by length (LUSPO).

    TRL's bnpo divides by the tokens of the micro-batch at hand and averages over micro-batches, so that its gradient
    depends on the split; over the whole batch it is dapo. Its grpo, sapo, luspo and dr_grpo average over micro-batches
    too, which is the same wherever those have equally many rows.

    |o_i| counts the tokens of row i that the mask keeps, n the rows that have any. A fully masked row (a truncated
    completion left out by option) thus counts nowhere, neither above nor below; TRL counts such rows in n. A row that
    is merely not worth a forward pass (a group without variance) keeps its mask here, and the caller skips it later:
    its zeros belong to the mean.

    Args:
        mask: bool [N, L], of the whole optimizer batch.
        length: for "constant" only, the most tokens a sequence may have.
        dtype: of the weights.
    Returns: weights [N, L], exactly 0 where masked; all 0 if everything is masked. "token" and "sequence" otherwise
        sum to 1.
    Raises: ValueError if the mask is not boolean, `how` is unknown, the dtype would round the weights, or `length` is
        missing, below 1 or without use.
    Source: arXiv:2503.14476, eq. 8 (there within one group); arXiv:2402.03300, eq. 3; arXiv:2602.05261;
        arXiv:2503.20783, section 3.2.
    """
    require_mask(mask)
    _require_precise(dtype)
    if (length is not None) != (how == "constant") or (length is not None and length < 1):
        raise ValueError(
            f"how is {how!r} and length is {length}: 'constant' needs a length of at least 1, the others none"
        )
    tokens = mask.sum(1, keepdim=True)
    sequences = (tokens > 0).sum()
    match how:
        case "token":
            denominators = tokens.sum()
        case "sequence":
            denominators = sequences * tokens
        case "sum":
            denominators = sequences
        case "constant":
            assert length is not None
            denominators = sequences * length
        case _:
            raise ValueError(f"how is {how!r}, expected 'token', 'sequence', 'sum' or 'constant'")
    return mask.to(dtype) / denominators.clamp(min=1)


def row_weights(counts: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each row's loss counts in the mean over the rows of the whole optimizer batch, 1 / n.

    Args:
        counts: bool [N], the rows that count, of the whole optimizer batch; `mask.any(1)` for sequences.
        dtype: of the weights.
    Returns: weights [N], exactly 0 for a row that does not count; they sum to 1 unless none does.
    Raises: ValueError if `counts` is not boolean [N] or the dtype would round the weights.
    """
    if counts.dtype != torch.bool or counts.dim() != 1:
        raise ValueError(f"expected booleans [N], found {counts.dtype} {list(counts.shape)}")
    _require_precise(dtype)
    return counts.to(dtype) / counts.sum().clamp(min=1)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ values · weights over the positions with a weight.

    Where the weight is 0 a value may be NaN or infinite: it adds exactly 0 to the sum and gets a gradient of exactly
    0. (What computed that value may still turn a 0 into NaN by multiplying it with an infinity: fill masked
    log-probabilities with something finite.)

    Args:
        values: float [N, L] or [N], of any part of the batch.
        weights: float of that shape, the same part of what `token_weights` or `row_weights` gave.
    Returns: a number, [].
    Raises: ValueError if shapes differ.
    """
    require_same_shape(values=values, weights=weights)
    return (torch.where(weights != 0, values, 0.0) * weights).sum()


def _require_precise(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype is {dtype}, expected torch.float32 or torch.float64: a weight is summed over the batch"
        )
