"""Attention of one query a sequence, as two plain products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from taurl.llm.models.attention import HARMLESS

NAME = "taurl_one_query"
IGNORED = HARMLESS | {"dropout", "is_causal"}  # dropout is off, and the mask says what a query sees


def one_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """softmax(scale · q · Kᵀ + mask) · V for the queries of a group that share a key head; else transformers' sdpa.

    Args:
        query: [R, heads, Q, size]; the plain products are for Q = 1.
        key, value: [R, key heads, columns, size], each key head shared by heads / key heads queries.
        attention_mask: float [R, 1, 1, columns], added to the scores; for more queries, or where it differs by head,
            it goes to sdpa as it is.
        scaling: 1 / √size if None.
        rest: what is not known to be harmless (a soft cap, sinks) goes to sdpa, which refuses or ignores it.
    Returns: [R, Q, heads, size], and no weights.
    """
    changes = any(value is not None for name, value in rest.items() if name not in IGNORED)
    if query.shape[2] != 1 or attention_mask is None or attention_mask.shape[1] != 1 or changes:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
        return found
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
    scores = (grouped @ key.transpose(2, 3)).add_(attention_mask)
    attended = scores.softmax(-1) @ value
    return attended.reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAME, one_query_attention)


def pays(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the plain products are known to be faster: measured in float32 on a CPU, in place of sdpa."""
    return config._attn_implementation == "sdpa" and dtype == torch.float32 and device.type == "cpu"


@contextmanager
def attending_by_plain_products(config: Any) -> Iterator[None]:
    """Let a model's layers attend by `one_query_attention` for a while."""
    own = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = own
