"""A language model run over slots: prompts fill the columns from 0 on, then each row takes one token at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taurl.llm.generation.attention import attending_by_plain_products, pays
from taurl.llm.generation.cache import SlotCache
from taurl.llm.generation.fused import beside, fused, fusible_layers
from taurl.llm.generation.packed import PackedLinears
from taurl.llm.models.attention import NAME as WHOLE_PRODUCTS
from taurl.llm.models.heads import body, causal_lm, check_head, evaluating, output_head
from taurl.runtime.errors import InputError

COLUMN_STEP = 32  # attention sees a multiple of this many columns, so that kernels meet few distinct shapes


class SlotModel:
    """Forward passes of a causal language model of `transformers` over a `SlotCache`.

    Args:
        model: every layer full or sliding-window attention that goes by the mask it is given ("sdpa" or "eager").
    Raises: InputError for any other model.
    """

    def __init__(self, model: PreTrainedModel):
        require_known(model)
        check_head(model)
        self.model = model
        self.config = model.config.get_text_config()
        self.window = getattr(self.config, "sliding_window", None)
        self.layer_kinds = layer_kinds(self.config)
        self.packed = PackedLinears(causal_lm(model))
        self.bytes_a_token = self._bytes_a_token()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Prepare the model for forward passes: evaluation mode, packed weights, fewer operators.

        Every pass belongs in here. Afterwards the model is as it was, for the trainer's own passes.
        """
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            layers = fusible_layers(self.packed.model)
            packed = stack.enter_context(self.packed.in_place({layer.self_attn: beside(layer) for layer in layers}))
            if pays(self.config, self.model.dtype, self.model.device):
                stack.enter_context(attending_by_plain_products(self.config))
            stack.enter_context(fused(layers, packed))
            yield

    def new_cache(self, slots: int, tokens: int) -> SlotCache:
        """Storage for `slots` sequences of up to `tokens` tokens, prompt included."""
        return SlotCache(self.config.num_hidden_layers, slots, round_up(tokens, COLUMN_STEP))

    def bytes_of(self, tokens: int) -> int:
        """Bytes of storage for one sequence of up to `tokens` tokens."""
        return self.bytes_a_token * round_up(tokens, COLUMN_STEP)

    @torch.inference_mode()
    def _bytes_a_token(self) -> int:
        """Bytes of one token's keys and values in all layers, as the model fills them."""
        with evaluating(self.model):
            cache, _ = self.prefill([[0]])
        filled = [layer for layer in cache.slot_layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)

    def prefill(self, prompts: Sequence[Sequence[int]], beginning: SlotCache | None = None) -> tuple[SlotCache, Tensor]:
        """Put prompts through the model, padded on the right: their keys and values, and the logits [P, V] that follow.

        Padding is harmless: no token sees a column after its own, and decoding writes over it column by column.

        Args:
            beginning: what all of them begin with, prefilled alone: it does not go through the model again.
        """
        device, lengths = self.model.device, [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids, rows = ids.to(device), torch.arange(len(prompts), device=device)
        cache = SlotCache(self.config.num_hidden_layers, *ids.shape)
        start = 0
        if beginning is not None:
            start = beginning.place.view
            cache.copy_rows(beginning, torch.zeros_like(rows), rows, start)
        cache.place.prefill_from(start, view=ids.shape[1])
        positions = torch.arange(start, ids.shape[1], device=device).expand(len(prompts), -1)
        hidden = self._forward(cache, ids[:, start:], positions)
        return cache, self._logits(hidden[rows, torch.tensor(lengths, device=device) - 1 - start])

    def decode(self, cache: SlotCache, tokens: Tensor, columns: Tensor, seen: int) -> Tensor:
        """Put one token of each of the first R rows through the model, at its column: the logits [R, V] that follow.

        Args:
            tokens, columns: int64 [R], on the model's device; no number of theirs is read back from there.
            seen: more than the last of the columns.
        """
        cache.place.decode_at(columns, view=round_up(seen, COLUMN_STEP))
        return self._logits(self._forward(cache, tokens[:, None], columns[:, None])[:, -1])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, d], through the head as a layer, which may be packed."""
        plain: Any = causal_lm(self.model)
        return output_head(plain).finish(plain.get_output_embeddings()(hidden))

    def _forward(self, cache: SlotCache, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [R, Q, d] of tokens [R, Q] at their positions, each seeing the columns up to its own."""
        own = positions[:, None, :, None]
        columns = torch.arange(cache.place.view, device=ids.device)
        masks = {"full_attention": columns <= own}  # bool [R, 1, Q, view]
        if self.window:
            masks["sliding_attention"] = masks["full_attention"] & (columns > own - self.window)
        attends = self.config._attn_implementation
        # These add the mask to the scores: sdpa, too, which on a CPU would make one to add of it in every layer.
        if attends == "eager" or (ids.shape[1] == 1 and ids.device.type == "cpu"):
            lowest = torch.finfo(self.model.dtype).min
            masks = {kind: (~mask).to(self.model.dtype) * lowest for kind, mask in masks.items()}
        output = body(self.model)(
            input_ids=ids,
            attention_mask=masks[self.layer_kinds[0]] if len(self.layer_kinds) == 1 else masks,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def layer_kinds(config: Any) -> list[str]:
    """The kinds of attention layers that a model's config names, sorted."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # models without layer types: a window, where there is one, holds for every layer
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
    return sorted(set(kinds))


def require_known(model: PreTrainedModel) -> None:
    """Raise an InputError unless the model's layers are attention that goes by a boolean mask and a cache."""
    plain: Any = causal_lm(model)
    config = plain.config.get_text_config()
    name = type(plain).__name__
    if unknown := set(layer_kinds(config)) - {"full_attention", "sliding_attention"}:
        found = f"{name} has layers of kind {', '.join(sorted(unknown))}"
    elif plain._is_stateful or not plain._supports_attention_backend:
        found = f"{name} has layers of its own kind"
    elif config._attn_implementation not in ("sdpa", "eager", WHOLE_PRODUCTS):
        found = f"{name} was loaded with attn_implementation={config._attn_implementation!r}, not 'sdpa' or 'eager'"
    else:
        return
    raise InputError(
        f"the slot sampler knows full and sliding-window attention, but {found}; use the generator 'transformers'"
    )


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step
