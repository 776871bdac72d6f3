"""Layers as Llama has them in fewer operators: activation, gating and residual sums ride on oneDNN's packed products.

A step of few tokens spends as long in launching operators as in the smaller of them, and `transformers` launches some
eighty a layer. Here it is some forty. The mathematics is the layer's own, up to rounding.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from taurl.llm.generation.packed import Packed, fitting, packed_linear, widened
from taurl.llm.models.compiled import as_its_class_says

# Families whose layers normalise by root mean square before attention and before a network gated by SiLU, add both to
# what came in, and turn whole heads; Qwen 3 normalises queries and keys too.
FAMILIES = "Llama", "Mistral", "Qwen2", "Qwen3"


def fusible_layers(model: nn.Module) -> list[Any]:
    """The model's decoder layers that `fused_forward` computes: of a known family, with layers that are packed."""
    return [layer for layer in model.modules() if is_plain(layer)]


def is_plain(layer: Any) -> bool:
    """Whether this is a decoder layer as `transformers` made it: nothing put in its place or listening within."""
    family, ending, _ = type(layer).__name__.partition("DecoderLayer")
    if family not in FAMILIES or not ending:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for name, norm in attention.named_children() if name.endswith("_norm")]
    of_classes = {layer: "DecoderLayer", attention: "Attention", mlp: "MLP"} | dict.fromkeys(norms, "RMSNorm")
    home = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    if any((type(m).__module__, type(m).__name__) != (home, family + name) for m, name in of_classes.items()):
        return False
    if type(mlp.act_fn) is not SiLUActivation or attention.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        return False
    within = [module for module in layer.modules() if module is not layer]
    if any(m._forward_hooks or m._forward_pre_hooks or not as_its_class_says(m) for m in within):
        return False
    others = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return all(fitting(layers) for layers in (beside(layer), *([other] for other in others)))


def beside(layer: Any) -> list[nn.Module]:
    """The linear layers of a decoder layer's attention that see the same input, and so may be one product."""
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


@contextmanager
def fused(layers: Sequence[Any], packed: Mapping[nn.Module, Packed]) -> Iterator[None]:
    """Let these layers compute by `fused_forward` for a while; `packed` has those of `beside` under their attention."""
    turn = Rotation()
    try:
        for layer in layers:
            layer.forward = functools.partial(fused_forward, layer, packed, turn)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def fused_forward(
    layer: Any, packed: Mapping[nn.Module, Packed], turn: "Rotation", hidden_states: Tensor, *mask: Any, **others: Any
) -> Tensor:
    """A layer's forward pass, hidden states [R, Q, d] to hidden states [R, Q, d]: h + attention, then h + network.

    Args:
        layer: one of `fusible_layers`.
        packed: its linear layers; q, k and v side by side under its attention.
        turn: shared by the layers of a model.
        mask, others: what `transformers` gives the layer.
    """
    mlp, out = layer.mlp, packed[layer.self_attn.o_proj]
    attended = attend(layer, packed, turn, hidden_states, *mask, **others)
    hidden_states = with_other(out, attended, hidden_states, "add")
    inner = normalised(layer.post_attention_layernorm, hidden_states)
    gated = with_other(packed[mlp.up_proj], inner, packed_linear(packed[mlp.gate_proj], inner, "swish"), "mul")
    return with_other(packed[mlp.down_proj], gated, hidden_states, "add")


def attend(
    layer: Any,
    packed: Mapping[nn.Module, Packed],
    turn: "Rotation",
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any = None,
    **others: Any,
) -> Tensor:
    """What a layer's heads gather, side by side, [R, Q, heads · size]: its attention without the output layer."""
    attention = layer.self_attn
    rows, queries, _ = hidden_states.shape
    product = packed_linear(packed[attention], normalised(layer.input_layernorm, hidden_states))
    heads = product.view(rows, queries, -1, attention.head_dim)
    shared = attention.v_proj.out_features // attention.head_dim  # key heads, and as many of values
    query_key, value = heads.tensor_split((-shared,), 2)
    if hasattr(attention, "q_norm"):
        query, key = query_key.tensor_split((-shared,), 2)
        query_key = torch.cat((normalised(attention.q_norm, query), normalised(attention.k_norm, key)), 2)
    query, key = turn(query_key, position_embeddings).tensor_split((-shared,), 2)
    query, key, value = (of_heads.transpose(1, 2) for of_heads in (query, key, value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    mix = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    mixed: Tensor = mix(attention, query, key, value, attention_mask, scaling=attention.scaling)[0]
    return mixed.reshape(rows, queries, -1)


def normalised(norm: Any, hidden: Tensor) -> Tensor:
    """Root mean square normalisation of the last axis by a layer of `transformers`."""
    found: Tensor = rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)
    return found


def with_other(packed: Packed, hidden: Tensor, other: Tensor, operation: str) -> Tensor:
    """hidden · Wᵀ + b of a packed W, added to or multiplied with another tensor ("add", "mul") before it is rounded."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
        widened(packed, hidden), other, packed.weight, packed.bias, operation
    )
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
