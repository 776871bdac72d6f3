"""Linear layers whose weights oneDNN has packed once, in place of a product that packs them at every call."""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 32  # what a weight is packed for; other numbers of rows work as well
SAMPLED = 256  # numbers of a weight that are compared to see whether it has changed


class PackedLinears:
    """A CPU model's linear layers, packed; LoRA adapters are merged into them, for sampling only.

    In half precision adapters stand beside W: what a few steps have learned is less than the rounding of W, and merged
    into it would be gone from what is sampled, though not from what is trained.

    The packed weights are a copy, some 0.2 s for a model of 135M weights, and the only one: merged weights are packed
    and dropped. A layer is packed again when its weights or its adapters have changed. What cannot be packed is left as
    it is: float64 and what oneDNN lacks on this processor, other devices, adapters that do more than W + s · B · A,
    quantised and sharded weights, and layers that are not `nn.Linear`.

    Args:
        model: the module whose layers are packed, its output head included.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._packed: dict[nn.Module, Packed] = {}

    @contextmanager
    def in_place(self, together: "Together | None" = None) -> Iterator[dict[nn.Module, "Packed"]]:
        """Let the layers compute with packed weights for a while, under inference mode; then they are as before.

        Args:
            together: layers that are packed side by side, as one, under the module that they belong to, and for which
                `fitting` is not None. They are not replaced, and nor is that module: what asked for it computes them.
        Yields: what is packed, by module.
        """
        together = together or {}
        packed = self._packed = self._refreshed(together)
        layers = [module for module in packed if module not in together]
        try:
            for layer in layers:
                layer.forward = functools.partial(packed_linear, packed[layer])  # hides the class's own
            yield packed
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def release(self) -> None:
        """Let go of what was packed of weights that are trained: after an update it would have to be packed again."""
        self._packed = {
            layer: packed
            for layer, packed in self._packed.items()
            if not any(source.requires_grad for source in packed.sources)
        }

    def _refreshed(self, together: "Together") -> dict[nn.Module, "Packed"]:
        """The layers as they are by now: new and changed ones packed, the others taken over."""
        found = {}
        for module, parts in packable(self.model, together):
            sources = (
                *(linear.weight for linear, _ in parts),
                *(w for _, factors in parts for a, b, _ in factors for w in (a, b)),
            )
            scales = tuple(scale for _, factors in parts for _, _, scale in factors)
            packed = self._packed.pop(module, None)  # one by one, so that there are never two copies of all
            if packed is None or packed.stale(sources, scales):
                weight, down = with_adapters(parts)
                packed = Packed(
                    pack(weight),
                    None if down is None else pack(down),
                    sources,
                    scales,
                    versions=tuple(map(version, sources)),
                    samples=tuple(sample(source).clone() for source in sources),
                )
            found[module] = replace(packed, bias=bias_of(parts))
        return found


@dataclass(frozen=True)
class Packed:
    """A packed weight, the packed A of adapters whose B stands beside it, what both were made from, and the bias."""

    weight: Tensor
    down: Tensor | None
    sources: tuple[Tensor, ...]
    scales: tuple[float, ...]
    versions: tuple[tuple[int, int], ...]
    samples: tuple[Tensor, ...]
    bias: Tensor | None = None

    def stale(self, weights: Sequence[Tensor], scales: Sequence[float]) -> bool:
        """Whether the weights are others by now.

        torch counts what is written to a tensor, but neither through its `.data` nor by a kernel that takes a pointer
        (bitsandbytes); hence a look at some of the numbers as well. Only such a write to a few numbers of a weight
        goes unnoticed.
        """
        return (
            len(weights) != len(self.sources)
            or any(weight is not source for weight, source in zip(weights, self.sources, strict=True))
            or tuple(scales) != self.scales
            or tuple(map(version, weights)) != self.versions
            or not all(torch.equal(sample(w), before) for w, before in zip(weights, self.samples, strict=True))
        )


Factors = list[tuple[Tensor, Tensor, float]]  # LoRA's A [r, in], B [out, r] and scale, of each active adapter
Part = tuple[nn.Linear, Factors]  # a plain linear layer, and the adapters of the layer that wraps it
Together = Mapping[nn.Module, Sequence[nn.Module]]


def packed_linear(packed: Packed, hidden: Tensor, activation: str = "none") -> Tensor:
    """hidden [..., in] · Wᵀ + b, of a packed W with its adapters, then oneDNN's activation of that name."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        widened(packed, hidden), packed.weight, packed.bias, activation, [], ""
    )
    return found


def widened(packed: Packed, hidden: Tensor) -> Tensor:
    """What is multiplied with a packed weight: hidden [..., in] and, for adapters beside W, hidden · Aᵀ behind it."""
    if packed.down is None:
        return hidden
    return torch.cat((hidden, torch.ops.mkldnn._linear_pointwise(hidden, packed.down, None, "none", [], "")), -1)


def packable(module: nn.Module, together: Together) -> Iterator[tuple[nn.Module, list[Part]]]:
    """Each layer that can be packed, as the plain linear layer it is or wraps; those together under their module."""
    if part := part_of(module):
        yield module, [part]
        return
    beside = together.get(module, ())
    if beside:
        parts = fitting(beside)
        assert parts is not None, "what is to be packed together must fit"
        yield module, parts
    for child in module.children():
        if child not in beside:
            yield from packable(child, together)


def fitting(layers: Sequence[nn.Module]) -> list[Part] | None:
    """The parts of layers that one product can stand for; None where one cannot be packed, or they differ too much.

    They have one dtype, and all a bias or none.
    """
    parts = [part for layer in layers if (part := part_of(layer))]
    kinds = {(linear.weight.dtype, linear.bias is None) for linear, _ in parts}
    return parts if len(parts) == len(layers) and len(kinds) == 1 else None


def part_of(module: nn.Module) -> Part | None:
    """The plain linear layer that this one is or wraps, and the adapters beside it; None where it cannot be packed."""
    adapters = active_adapters(module)
    linear: Any = module if adapters is None else module.get_submodule("base_layer")
    if type(linear) is nn.Linear and "forward" not in vars(module) and can_pack_weight(linear.weight):
        return linear, adapters or []
    return None


def with_adapters(parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
    """Layers side by side as one weight with their adapters, and what else the adapters need.

    Adapters are merged, and the weight is [out, in]. In half precision their s · B stand beside W, [out, in + r], to be
    multiplied with (x, A · x), so that W · x + s · B · (A · x) is rounded once, as a sum. Then A [r, in] comes with it.
    """
    if not any(factors for _, factors in parts) or not is_half(parts[0][0].weight.dtype):
        return side_by_side([merged(linear.weight, factors) for linear, factors in parts]), None
    weight = side_by_side([linear.weight.detach() for linear, _ in parts])
    down = torch.cat([a.detach() for _, factors in parts for a, _, _ in factors])
    ups = [
        torch.cat([weight.new_zeros(linear.out_features, 0), *(scale * b.detach() for _, b, scale in factors)], 1)
        for linear, factors in parts
    ]
    beside: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    return torch.cat((weight, beside.to(weight.dtype)), 1), down.to(weight.dtype)


def bias_of(parts: Sequence[Part]) -> Tensor | None:
    """The layers' bias, side by side; all have one, or none has."""
    found = [linear.bias.detach() for linear, _ in parts if linear.bias is not None]
    return side_by_side(found) if found else None


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one, along their first axis; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def active_adapters(module: Any) -> Factors | None:
    """The active adapters of a LoRA layer of `peft`; None for other modules, and where one does more than B · A."""
    layers = sys.modules.get("peft.tuners.lora.layer")  # a second to import; without it there is no such layer
    if layers is None or type(module) is not layers.Linear or module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if any(name in module.lora_variant or module.lora_bias[name] for name in names):
        return None
    return [(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]) for name in names]


def can_pack_weight(weight: Tensor) -> bool:
    """Whether this is an ordinary weight on the CPU, of a dtype that oneDNN multiplies here."""
    plain = type(weight) in (nn.Parameter, Tensor) and not weight.is_inference()
    return plain and weight.device.type == "cpu" and can_pack(weight.dtype)


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product is there, for this dtype on this processor."""
    if dtype == torch.float64 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ones = torch.ones(2, 2, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(ones, 2)
        product = torch.ops.mkldnn._linear_pointwise(ones, packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(product, 2 * ones)


def is_half(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are rounded so far that adapters are not merged into them."""
    return dtype.itemsize < 4


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] in the order that oneDNN reads it in."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return found


def merged(weight: Tensor, factors: Factors) -> Tensor:
    """W + Σ s · B · A in the dtype of W, added up in float32."""
    if not factors:
        return weight.detach()
    total = weight.float()
    for a, b, scale in factors:
        total = total + scale * (b.float() @ a.float())
    return total.to(weight.dtype)


def version(weight: Tensor) -> tuple[int, int]:
    """Where a tensor's numbers are, and how often torch has written to them."""
    return weight.data_ptr(), weight._version


def sample(weight: Tensor) -> Tensor:
    """Some of a tensor's numbers, evenly spread over it."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)]
