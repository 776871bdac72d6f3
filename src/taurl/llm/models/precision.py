"""The precision of a model's weights."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cast_weights(model: Model, dtype: torch.dtype | None, device: torch.device | str | None = None) -> Model:
    """Move a model to a device and its floating-point weights to a dtype, in place; None leaves them as they are.

    Buffers stay as they are, unlike with `Module.to`: transformers keeps the frequencies of rotary positions in float32
    whatever the weights are in, and rounded to bfloat16 they would be other positions. A quantised model stays whole
    where it is, in its own precision.
    """
    if getattr(model, "is_quantized", False):
        return model
    model.to(device=device)
    for weight in model.parameters():
        if dtype is not None and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return model
