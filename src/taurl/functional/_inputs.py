"""What every file here does at the door: shapes are asserted, half precision is widened."""

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError that names the tensors and their shapes unless all agree: nothing broadcasts by accident."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected one shape, found {found}")


def require_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Raise a ValueError unless `mask` is boolean, [N, L] and shaped like every other tensor given."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"expected a boolean mask [N, L], found {mask.dtype} {list(mask.shape)}; pass mask.bool()")
    require_same_shape(mask=mask, **tensors)


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 stays float64; everything else becomes float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
