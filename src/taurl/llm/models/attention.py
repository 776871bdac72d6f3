"""Attention in float32 for models in bfloat16 on a CPU, where torch's own kernel is the slower one.

Its backward pass in bfloat16 hands some small products of every row and head to oneDNN, one by one. Where that costs
more than the arithmetic saves, queries, keys and values are widened, and what comes out is rounded again; the products
of the layers beside it stay in bfloat16.
"""

import functools
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "taurl_float32"
SHAPE = 8, 9, 16, 64, 64  # rows, heads, queries, keys, size: short completions with their prompt
LONGEST = 256  # keys; of longer rows the products are large enough for bfloat16
WORTH = 1.5  # times as fast, from which on float32 is taken: noise should not turn the choice


def attend_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """`transformers`' sdpa, in float32 for short rows of more than one query; arguments and result are those of that.

    A single query, as in decoding, has no backward pass and reads its keys as they are.
    """
    if query.shape[2] == 1 or key.shape[2] > LONGEST:
        alone: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        return alone
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide: Tensor
    wide, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **rest)
    return wide.to(query.dtype), None


AttentionInterface.register(NAME, attend_in_float32)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Choice:
    """What the models attend in that this process loads, once it is known: what is faster, or what a run began with."""

    in_float32: bool | None = None


def choose(in_float32: bool | None = None) -> bool:
    """Choose for all models in bfloat16 on this CPU that are loaded from now on; None measures which is faster."""
    Choice.in_float32 = float32_pays() if in_float32 is None else in_float32
    return Choice.in_float32


def attending_as_chosen(model: PreTrainedModel) -> PreTrainedModel:
    """The model; the layers of one in bfloat16 on a CPU that attend by sdpa do so in float32, if that was chosen."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return model
    if choose(Choice.in_float32):
        for config in (model.config, model.config.get_text_config()):
            if config._attn_implementation == "sdpa":
                config._attn_implementation = NAME
    return model


@functools.cache
def float32_pays() -> bool:
    """Whether attention of bfloat16 is faster on this CPU where it is computed in float32: measured once a process."""
    return seconds(torch.bfloat16) > WORTH * seconds(torch.float32)


def seconds(dtype: torch.dtype) -> float:
    """Best time of three for attention of bfloat16 computed in a dtype, forward and backward, after a first one."""
    rows, heads, queries, keys, size = SHAPE
    shapes = (rows, heads, queries, size), (rows, heads, keys, size), (rows, heads, keys, size)
    given = [torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    mask = torch.ones(queries, keys, dtype=torch.bool)
    times = []
    with torch.enable_grad():
        for _ in range(4):
            start = time.perf_counter()
            query, key, value = (tensor.to(dtype) for tensor in given)
            torch.autograd.grad(scaled_dot_product_attention(query, key, value, attn_mask=mask).sum(), given)
            times.append(time.perf_counter() - start)
    return min(times[1:])
