"""Whitening: numbers with mean 0 and standard deviation 1 over all of a batch that counts."""

import math

import torch
from torch import Tensor

from taurl.functional._deviation import unbiased_std
from taurl.functional._inputs import require_positive, require_same_shape, with_precision_of


def whitening_statistics(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the values that count, for `whiten` to apply part by part.

    Equal values have a std of exactly 0, and so has a single one; nothing at all has mean 0 and std 0.

    Args:
        values: float of any shape, the whole optimizer batch; anything where masked.
        mask: bool of that shape, the values that count; by default all.
    Returns: mean, std, both [], float64, detached.
    Raises: ValueError if shapes or dtypes do not fit or a value that counts is NaN or infinite.
    """
    counts = _mask_for(values, mask)
    mean, std = _row_statistics(values.detach().reshape(1, -1), counts.reshape(1, -1))
    return mean[0, 0], std[0, 0]


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
    those of the whole optimizer batch, given or taken from `values`: whitening each micro-batch by its own would make
    the gradient depend on the split. A single value, and values that are all equal, give exactly 0 (or μ).

    Stable-Baselines3 whitens each minibatch by itself, with ε = 1e-8, and leaves a batch of one as it is. Here ε is
    1e-4 as in all of `advantages`: noise with a std far below that is not blown up to 1.

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
    return with_precision_of(values, torch.where(counts, whitened, 0.0))


def whiten_rows(values: Tensor, mask: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """`whiten`, each row by itself: of minibatches side by side, what each of them would get alone.

    Args:
        values: float [M, N], a minibatch a row; anything where masked.
        mask: bool [M, N].
        epsilon: ε > 0.
    Returns: whitened values [M, N], 0 where masked, detached; float32, or float64 for float64.
    Raises: ValueError as `whiten` does, or if the values are not [M, N].
    """
    if values.dim() != 2:
        raise ValueError(f"values are {list(values.shape)}, expected [M, N]")
    counts = _mask_for(values, mask)
    return whiten(values, counts, statistics=_row_statistics(values.detach(), counts), epsilon=epsilon)


def whiten_groups(values: Tensor, mask: Tensor, *, group_size: int, epsilon: float = 1e-4) -> Tensor:
    """Values of tokens, centred and scaled within their group, each row counting once, however long it is.

        y_it = (x_it − m) / (s + ε),   m = mean_i mean_t x_it,   s² = Σ_i mean_t (x_it − m)² / (n − 1)

    i over the n rows of the group that have tokens. Where all tokens of a row have one value, as with a reward at the
    end, γ = λ = 1 and no critic, s is the unbiased standard deviation of those values, and this is
    `advantages.group_relative` of them. A row that is left alone has nothing to be compared with: it gets 0.

    Args:
        values: float [N, L], group after group; anything where masked.
        mask: bool [N, L]; a row without any token counts nowhere.
        group_size: rows of a group; divides N.
        epsilon: ε > 0.
    Returns: whitened values [N, L], 0 where masked, detached; float32, or float64 for float64.
    Raises: ValueError if shapes or dtypes do not fit, N is no multiple of the group's size, or as `whiten` does.
    """
    if values.dim() != 2 or group_size < 1 or len(values) % group_size:
        raise ValueError(f"values are {list(values.shape)} and group_size {group_size}: expected [N, L], N a multiple")
    counts = _mask_for(values, mask)
    require_positive(epsilon=epsilon)
    values = values.detach()
    alive = counts.any(1).view(-1, group_size)
    rows = alive.sum(1, keepdim=True)

    def at_each_row(of_groups: Tensor) -> Tensor:  # [M, 1] → [N, 1]
        return of_groups.expand(alive.shape).reshape(-1, 1)

    means = _row_statistics(values, counts)[0].view(alive.shape)
    centred = values.double() - at_each_row(_row_statistics(means, alive)[0])
    squares = _row_statistics(centred.square().where(counts, 0.0), counts)[0].view(alive.shape)
    spread = at_each_row(squares.where(alive, 0.0).sum(1, keepdim=True) / (rows - 1).clamp(min=1)).sqrt()
    compared = counts & at_each_row(rows > 1)
    return with_precision_of(values, torch.where(compared, centred / (spread + epsilon), 0.0))


def _row_statistics(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of what counts in each row, both [M, 1], float64; 0 of nothing at all."""
    kept = torch.where(counts, values, 0.0).double()  # so squares and long sums of float32 stay exact
    if not kept.sum().isfinite() and not kept.isfinite().all():
        found = int((~kept.isfinite()).sum())
        raise ValueError(
            f"{found} of {int(counts.sum())} values are NaN or infinite, expected finite ones where they count"
        )
    number = counts.sum(1, keepdim=True)
    mean = kept.sum(1, keepdim=True) / number.clamp(min=1)
    if values.shape[1]:  # the mean of equal floats may be off by a rounding: it lies between smallest and largest
        smallest = torch.where(counts, kept, math.inf).amin(1, keepdim=True)
        largest = torch.where(counts, kept, -math.inf).amax(1, keepdim=True)
        mean = torch.where(number > 0, mean.clamp(smallest, largest), 0.0)
    return mean, unbiased_std(torch.where(counts, kept - mean, 0.0), number)


def _mask_for(values: Tensor, mask: Tensor | None) -> Tensor:
    if not values.is_floating_point():
        raise ValueError(f"values are {values.dtype}, expected floats")
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected booleans; pass mask.bool()")
    require_same_shape(values=values, mask=mask)
    return mask
