"""What every file here does at the door: shapes are asserted, half precision widened, masked positions filled."""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def require_same_shape(**tensors: Any) -> None:
    """Raise a ValueError that names tensors, or arrays, and shapes unless all agree: nothing broadcasts by accident."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"expected one shape, found {found}")


def require_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Raise a ValueError unless `mask` is boolean, [N, L] and shaped like every other tensor given."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"expected a boolean mask [N, L], found {mask.dtype} {list(mask.shape)}; pass mask.bool()")
    require_same_shape(mask=mask, **tensors)


def require_rows(**tensors: Tensor) -> None:
    """Raise a ValueError unless every tensor is [N], of one N, and the first is floating."""
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected one number per row, [N]")
    require_same_shape(**tensors)
    name, first = next(iter(tensors.items()))
    if not first.is_floating_point():
        raise ValueError(f"{name} is {first.dtype}, expected a floating dtype")


def require_steps(terminated: Tensor, truncated: Tensor, **floats: Tensor) -> None:
    """Raise a ValueError unless both ends are boolean, [T, B], and shaped like every other tensor given."""
    if terminated.dtype != torch.bool or truncated.dtype != torch.bool:
        found = f"terminated {terminated.dtype} and truncated {truncated.dtype}"
        raise ValueError(f"found {found}, expected torch.bool for both")
    if terminated.dim() != 2:
        raise ValueError(f"terminated is {list(terminated.shape)}, expected time-major [T, B]")
    require_same_shape(**floats, terminated=terminated, truncated=truncated)


def require_positive(**numbers: float) -> None:
    """Raise a ValueError unless every number is positive and finite."""
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{name} is {number}, expected a positive, finite number")


def require_fractions(**numbers: float) -> None:
    """Raise a ValueError unless every number is in [0, 1]."""
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise ValueError(f"{name} is {number}, expected a number in [0, 1]")


def require_label_smoothing(label_smoothing: float) -> None:
    """Raise a ValueError unless 0 ≤ ε < 1/2: at one half the labels say nothing, above it they say the opposite."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected at least 0 and less than 0.5")


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 stays float64; everything else becomes float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def with_precision_of(given: Tensor, result: Tensor) -> Tensor:
    """The result in the dtype of what it was made from, at least float32."""
    return result.to(torch.promote_types(given.dtype, torch.float32))


def of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """All in the widest dtype among them, at least float32."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All in one vector, at least float32."""
    return torch.cat([at_least_float32(tensor).reshape(-1) for tensor in tensors])


def log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log π − log π_other, of one shape."""
    require_same_shape(logprobs=logprobs, other_logprobs=other_logprobs)
    return at_least_float32(logprobs) - at_least_float32(other_logprobs)


def masked_log_ratio(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The same, 0 where masked: filled after the difference, before anything whose derivative depends on its value."""
    require_mask(mask, logprobs=logprobs, other_logprobs=other_logprobs)
    return torch.where(mask, log_ratio(logprobs, other_logprobs), 0.0)
