"""Attention of one query a sequence, as two plain products."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from taurl.llm.models.attention import NAME as IN_FLOAT32
from taurl.llm.models.attention import attend_in_float32

NAMES = {"sdpa": "taurl_one_query", IN_FLOAT32: "taurl_one_query_float32"}  # by how longer queries attend
# What a layer may pass without changing the result: the mask has the window already, dropout is off.
HARMLESS = {"dropout", "sliding_window", "position_ids", "use_cache", "is_causal"}


def one_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    otherwise: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward,
    **rest: Any,
) -> tuple[Tensor, None]:
    """softmax(scale · q · Kᵀ + mask) · V for the queries of a group that share a key head.

    In float32 as two plain products; in bfloat16, where torch's small products are slow, by its fused kernel, to which
    the heads of a group are as many queries, so that keys and values are not repeated.

    Args:
        query: [R, heads, Q, size]; only Q = 1 is computed here.
        key, value: [R, key heads, columns, size], each key head shared by heads / key heads queries.
        attention_mask: float [R, 1, 1, columns], added to the scores; for more queries, or where it differs by head,
            it goes on as it is.
        scaling: 1 / √size if None.
        otherwise: what computes the rest.
        rest: what is not known to be harmless (a soft cap, sinks) goes on, to be refused or ignored.
    Returns: [R, Q, heads, size], and no weights.
    """
    changes = any(value is not None for name, value in rest.items() if name not in HARMLESS)
    if query.shape[2] != 1 or attention_mask is None or attention_mask.shape[1] != 1 or changes:
        return otherwise(module, query, key, value, attention_mask, scaling=scaling, **rest)
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, size)
    if query.dtype != torch.float32:
        attended = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return attended.reshape(rows, 1, heads, -1), None
    scores = (grouped * (size**-0.5 if scaling is None else scaling) @ key.transpose(2, 3)).add_(attention_mask)
    attended = scores.softmax(-1) @ value
    return attended.reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAMES["sdpa"], one_query_attention)
AttentionInterface.register(NAMES[IN_FLOAT32], partial(one_query_attention, otherwise=attend_in_float32))


def pays(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this is known to be faster than `transformers`' way: measured in float32 and bfloat16 on a CPU."""
    return config._attn_implementation in NAMES and dtype in (torch.float32, torch.bfloat16) and device.type == "cpu"


@contextmanager
def attending_one_query(config: Any) -> Iterator[None]:
    """Let a model's layers attend by `one_query_attention` for a while."""
    own = config._attn_implementation_internal
    config._attn_implementation_internal = NAMES[own]
    try:
        yield
    finally:
        config._attn_implementation_internal = own
