"""Layers as Llama has them in fewer operators: activation, gating and residual sums ride on oneDNN's packed products.

A step of few tokens spends as long in launching operators as in the smaller of them, and `transformers` launches some
eighty a layer. Here it is some twenty-five. The mathematics is the layer's own, up to rounding.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import AttentionInterface
from transformers.activations import SiLUActivation

from taurl.llm.generation.packed import Packed, Together, is_half, packed_linear, part_of

# Their layers normalise by root mean square before attention and before a network gated by SiLU, add both to what came
# in, and turn whole heads; Qwen 3 normalises queries and keys too.
KINDS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
ATTENTION = AttentionInterface()  # type: ignore[no-untyped-call]


def fusible_layers(model: nn.Module) -> list[Any]:
    """The model's decoder layers that `fused_forward` computes: of a known kind, every linear layer of them packed."""
    return [layer for layer in model.modules() if type(layer).__name__ in KINDS and is_plain(layer)]


def is_plain(layer: Any) -> bool:
    """Whether a decoder layer is as `transformers` made it: no hooks within, no adapters that stay apart."""
    attention, mlp = layer.self_attn, layer.mlp
    if not type(layer).__module__.startswith("transformers.models.") or type(mlp.act_fn) is not SiLUActivation:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layer.modules()):
        return False
    parts = [
        part_of(linear) for linear in (*beside(attention), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]
    return all(part and not (part[1] and is_half(part[0].weight.dtype)) for part in parts)


def beside(attention: Any) -> list[nn.Module]:
    """The layers that see the same input, one product."""
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def together(layers: Sequence[Any]) -> Together:
    """What `PackedLinears.in_place` shall pack side by side for these layers."""
    return {layer.self_attn: beside(layer.self_attn) for layer in layers}


@contextmanager
def fused(layers: Sequence[Any], packed: Mapping[nn.Module, Packed]) -> Iterator[None]:
    """Let these layers compute by `fused_forward` for a while."""
    turn = Rotation()
    try:
        for layer in layers:
            layer.forward = functools.partial(fused_forward, layer, packed, turn)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def fused_forward(
    layer: Any,
    packed: Mapping[nn.Module, Packed],
    turn: "Rotation",
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any,
    **others: Any,
) -> Tensor:
    """A layer's forward pass, hidden states [R, Q, d] to hidden states [R, Q, d].

    Args:
        layer: one of `fusible_layers`.
        packed: its linear layers; q, k and v side by side under its attention.
        turn: shared by the layers of a model.
        attention_mask, position_embeddings, past_key_values: as `transformers` gives them to the layer.
    """
    attention, mlp = layer.self_attn, layer.mlp
    rows, queries, _ = hidden_states.shape
    product = packed_linear(packed[attention], normalised(layer.input_layernorm, hidden_states))
    heads = product.view(rows, queries, -1, attention.head_dim)
    shared = attention.v_proj.out_features // attention.head_dim  # key heads, and as many of values
    query_key, value = heads[:, :, :-shared], heads[:, :, -shared:]
    if hasattr(attention, "q_norm"):
        query, key = query_key.tensor_split((-shared,), 2)
        query_key = torch.cat((normalised(attention.q_norm, query), normalised(attention.k_norm, key)), 2)
    query, key = turn(query_key, position_embeddings).tensor_split((-shared,), 2)
    keys, values = past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), attention.layer_idx)
    attend = ATTENTION[attention.config._attn_implementation]
    mixed, _ = attend(attention, query.transpose(1, 2), keys, values, attention_mask, scaling=attention.scaling)
    hidden_states = with_other(packed[attention.o_proj], mixed.reshape(rows, queries, -1), hidden_states, "add")
    inner = normalised(layer.post_attention_layernorm, hidden_states)
    of_gate = packed[mlp.gate_proj]
    gate = torch.ops.mkldnn._linear_pointwise(inner, of_gate.weight, of_gate.bias, "swish", [], "")
    gated = with_other(packed[mlp.up_proj], inner, gate, "mul")
    return with_other(packed[mlp.down_proj], gated, hidden_states, "add")


def normalised(norm: Any, hidden: Tensor) -> Tensor:
    """Root mean square normalisation of the last axis by a layer of `transformers`."""
    return rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def with_other(packed: Packed, hidden: Tensor, other: Tensor, operation: str) -> Tensor:
    """hidden · Wᵀ + b of a packed W, added to or multiplied with another tensor ("add", "mul") before it is rounded."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(hidden, other, packed.weight, packed.bias, operation)
    return found


class Rotation:
    """Rotary embedding of all heads at once; the sine's signs are prepared once a pass, not once a layer."""

    def __init__(self) -> None:
        self.prepared_of: tuple[Tensor, Tensor] | None = None

    def __call__(self, heads: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """x · cos + (−x₂, x₁) · sin for the halves x₁, x₂ of each head, of heads [R, Q, H, D]; cos, sin [R, Q, D]."""
        half = heads.shape[-1] // 2
        if embeddings is not self.prepared_of:
            cos, sin = (of_positions[:, :, None] for of_positions in embeddings)
            self.cos, self.sin = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)
            self.prepared_of = embeddings
        return torch.addcmul(heads * self.cos, heads.roll(half, -1), self.sin)
