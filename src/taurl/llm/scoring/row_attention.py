"""Attention within rows that are laid end to end: nothing is padded, no mask is made, and no row sees another.

The rows of a part make one long row of T tokens; every layer but attention works token by token and need not know. On
a GPU in half precision attention is one kernel for rows of varying lengths (flash attention), elsewhere one call a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from taurl.llm.models.attention import NAME as WHOLE_PRODUCTS
from taurl.llm.models.attention import attend, plain
from taurl.llm.models.heads import body, causal_lm, evaluating
from taurl.runtime.errors import InputError

NAME, NAME_WHOLE_PRODUCTS = "taurl_rows", "taurl_rows_whole_products"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# What a model may ask of attention beyond a scale and a window, by the names that transformers passes it under.
UNKNOWN = ("softcap", "s_aux", "position_bias")
AGREEMENT = 0.03  # relative; rounding in bfloat16 stays below it, rows that see each other are off by far more


def attend_within_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Sequence[int],
    row_bounds: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    windows: list[int | None] | None = None,
    whole_products: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row to itself, as `transformers` calls it.

    Args:
        query: [1, H, T, D]; key, value: [1, K, T, D] with K a divisor of H.
        row_lengths, row_bounds: as `laid_end_to_end` gives them; the sum of the lengths is T.
        sliding_window: how many tokens a token sees at most, itself included.
        windows: gets it from each layer; some models put it into their mask, which is none here, and not into the call.
        whole_products: attend as `models.attention` does.
    Returns: [1, T, H, D], and no weights.
    """
    if windows is not None:
        windows.append(sliding_window)
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise InputError(f"attention with {name} is not known row by row")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return varlen(query, key, value, row_bounds, max(row_lengths), scaling, sliding_window), None
    if query.is_cuda and key.shape[1] != query.shape[1]:  # torch's fast attention in float32 knows no grouped heads
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    outputs = []
    lengths = list(row_lengths)
    rows = (torch.split(tensor, lengths, 2) for tensor in (query, key, value))
    for q, k, v in zip(*rows, strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            place = torch.arange(q.shape[2], device=q.device)
            distance = place[:, None] - place
            mask = ((distance >= 0) & (distance < sliding_window))[None, None]
        outputs.append((attend if whole_products else plain)(q, k, v, mask, causal=mask is None, scale=scaling))
    return torch.cat(outputs, 2).transpose(1, 2), None


def laid_end_to_end(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What the attention of all layers is told of rows of these lengths; made once, since a GPU waits for it.

    Returns: `row_lengths` as they are, and `row_bounds`, int32 [n + 1], where each begins and the last ends.
    """
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {"row_lengths": lengths, "row_bounds": bounds}


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same by torch's flash attention for rows of varying lengths, which runs on a GPU in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # to the left, and nothing to the right
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended[None]


AttentionInterface.register(NAME, attend_within_rows)
AttentionInterface.register(NAME_WHOLE_PRODUCTS, partial(attend_within_rows, whole_products=True))


@contextmanager
def attending_within_rows(model: PreTrainedModel) -> Iterator[None]:
    """Inside, attention expects what `laid_end_to_end` gives; forward and backward pass both belong inside."""
    plain: Any = causal_lm(model)
    configs = list({id(config): config for config in (plain.config, plain.config.get_text_config())}.values())
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME_WHOLE_PRODUCTS if config._attn_implementation == WHOLE_PRODUCTS else NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@torch.no_grad()
def knows_rows(model: PreTrainedModel) -> bool:
    """Whether rows laid end to end get the hidden states that each gets alone.

    Not so with recurrent layers, with kinds of attention that are not known here, and with code of a model's own.
    """
    plain: Any = causal_lm(model)
    config = plain.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if not plain._supports_attention_backend or not set(kinds) <= KNOWN_LAYERS:
        return False
    windowed = kinds.count("sliding_attention") if kinds else config.num_hidden_layers
    windows: list[int | None] = []
    first, second = (torch.tensor([ids], device=plain.device) for ids in ([0, 1, 2], [1, 0, 2]))
    with evaluating(plain):
        alone = [body(plain)(input_ids=ids, use_cache=False).last_hidden_state for ids in (first, second)]
        try:
            with attending_within_rows(plain):
                together = body(plain)(
                    input_ids=torch.cat([first, second], 1),
                    position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]], device=plain.device),
                    use_cache=False,
                    windows=windows,
                    **laid_end_to_end([3, 3], plain.device),
                ).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except (InputError, TypeError, RuntimeError):
            return False  # asked for what is not known here; the lengths did not reach attention; no such kernel
    if getattr(config, "sliding_window", None) and len(windows) - windows.count(None) < windowed:
        return False
    expected = torch.cat(alone, 1)
    return bool((together - expected).abs().max() <= AGREEMENT * expected.abs().max())
