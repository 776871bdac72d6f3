"""From one loss per token to one number, so that it does not matter how the batch is cut.

The weight of each token is fixed once, over the whole optimiser batch, before any micro-batch runs; a part's loss is
a weighted sum, and the parts' losses and gradients add up to the whole batch's:

    weights = token_weights(mask, "token")                       # whole batch [N, L]
    for rows in parts:
        weighted_sum(loss_of(rows), weights[rows]).backward()
"""

from typing import Literal

import torch
from torch import Tensor

from taurl.functional._inputs import require_mask, require_same_shape

Aggregation = Literal["token", "sequence", "constant"]


def token_weights(
    mask: Tensor, how: Aggregation, *, length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What each token's loss counts in the loss of the whole optimiser batch.

        "token"     1 / Σ_i |o_i|       mean over all tokens (DAPO)
        "sequence"  1 / (n · |o_i|)     mean over sequences of the mean over their tokens (GRPO)
        "constant"  1 / (n · length)    sum over a number that does not depend on what was sampled (Dr. GRPO)

    |o_i| counts the tokens of row i that the mask keeps, n the rows that have any. A fully masked row (a truncated
    completion left out by option) thus counts nowhere, neither above nor below; TRL counts such rows in n. A row that
    is merely not worth a forward pass (a group without variance) keeps its mask here, and the caller skips it later:
    its zeros belong to the mean.

    Args:
        mask: bool [N, L], of the whole optimiser batch.
        length: for "constant" only, the most tokens a sequence may have.
        dtype: of the weights.
    Returns: weights [N, L], exactly 0 where masked; all 0 if everything is masked. "token" and "sequence" otherwise
        sum to 1.
    Raises: ValueError if the mask is not boolean, `how` is unknown, or `length` is missing, below 1 or without use.
    Source: arXiv:2503.14476, eq. 8; arXiv:2402.03300, eq. 3; arXiv:2503.20783, section 3.2.
    """
    require_mask(mask)
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
        case "constant":
            assert length is not None
            denominators = sequences * length
        case _:
            raise ValueError(f"how is {how!r}, expected 'token', 'sequence' or 'constant'")
    return mask.to(dtype) / denominators.clamp(min=1)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ values · weights over the positions with a weight.

    Where the weight is 0 a value may be NaN or infinite: it adds exactly 0 to the sum and gets a gradient of exactly
    0. (What computed that value may still turn a 0 into NaN by multiplying it with an infinity: fill masked
    log-probabilities with something finite.)

    Args:
        values: float [N, L], of any part of the batch.
        weights: float [N, L], the same part of what `token_weights` gave.
    Returns: a number, [].
    Raises: ValueError if shapes differ.
    """
    require_same_shape(values=values, weights=weights)
    return (torch.where(weights != 0, values, 0.0) * weights).sum()
