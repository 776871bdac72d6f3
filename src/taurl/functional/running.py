"""Running mean and variance of a stream of batches, as a plain state: `(state, batch) → state`."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and (biased) variance of so many samples; float64, [d], [d] and []."""

    mean: Tensor
    variance: Tensor
    samples: Tensor


def no_moments(*shape: int) -> Moments:
    """Of no sample yet: mean 0 and variance 1, which leave what they normalize as it is, within the bound.

    Args:
        shape: of one sample.
    """
    return Moments(torch.zeros(shape).double(), torch.ones(shape).double(), torch.zeros(()).double())


def updated_moments(moments: Moments, batch: Tensor) -> Moments:
    """The moments of all samples so far and this batch, exactly as if they had come together.

        δ = mean_B − mean,   mean' = mean + δ · n_B/n',   n'·var' = n·var + n_B·var_B + δ² · n·n_B/n'

    Args:
        batch: float [n, *shape]; n may be 0.
    Raises: ValueError if the shapes do not fit.
    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    if batch.shape[1:] != moments.mean.shape:
        raise ValueError(f"batch is {list(batch.shape)}, expected [n, {', '.join(map(str, moments.mean.shape))}]")
    if not len(batch):
        return moments
    batch = batch.detach().double()
    count = moments.samples + len(batch)
    delta = batch.mean(0) - moments.mean
    squares = moments.variance * moments.samples + batch.var(0, correction=0) * len(batch)
    squares += delta.square() * (moments.samples * len(batch) / count)
    return Moments(moments.mean + delta * (len(batch) / count), squares / count, count)


def normalized(values: Tensor, moments: Moments, *, bound: float = 10.0, epsilon: float = 1e-8) -> Tensor:
    """(x − mean) / √(variance + ε), clipped to ±bound.

    Args:
        values: float [.., *shape].
    Returns: that shape and dtype.
    Raises: ValueError if the shapes do not fit.
    """
    if values.shape[values.dim() - moments.mean.dim() :] != moments.mean.shape:
        raise ValueError(f"values are {list(values.shape)}, expected [.., {', '.join(map(str, moments.mean.shape))}]")
    scale = (moments.variance + epsilon).rsqrt()
    return ((values - moments.mean) * scale).clamp(-bound, bound).to(values.dtype)
