"""Linear layers whose weights oneDNN has packed once, in place of a product that packs them at every call."""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 32  # what a weight is packed for; other numbers of rows work as well
SAMPLED = 256  # numbers of a weight that are compared to see whether it has changed


class PackedLinears:
    """A CPU model's linear layers, packed; LoRA adapters are merged into them, for sampling only.

    In half precision adapters stay apart: what a few steps have learned is less than the rounding of W, and merged
    into it would be gone from what is sampled, though not from what is trained.

    The packed weights are a copy, some 0.2 s for a model of 135M weights, and the only one: merged weights are packed
    and dropped. A layer is packed again when its weights have changed. What cannot be packed is left as it is: float64
    and what oneDNN lacks on this processor, other devices, adapters that do more than W + s · B · A, quantised and
    sharded weights, and layers that are not `nn.Linear`.

    Args:
        model: the module whose layers are packed, its output head included.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._packed: dict[nn.Module, Packed] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the layers compute with packed weights for a while, under inference mode; then they are as before."""
        layers = self._packed = self._refreshed()
        try:
            for layer, packed in layers.items():
                layer.forward = functools.partial(packed_linear, packed)  # on the instance: hides the class's own
            yield
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

    def _refreshed(self) -> dict[nn.Module, "Packed"]:
        """The layers as they are by now: new and changed ones packed, the others taken over."""
        layers = {}
        for layer, linear, factors in packable_layers(self.model):
            apart, within = (factors, []) if is_half(linear.weight.dtype) else ([], factors)
            weights = (linear.weight, *(weight for a, b, _ in within for weight in (a, b)))
            scales = tuple(scale for _, _, scale in within)
            packed = self._packed.pop(layer, None)  # one by one, so that there are never two copies of all
            if packed is None or packed.stale(weights, scales):
                weight = torch.ops.mkldnn._reorder_linear_weight(merged(linear.weight, within), ROWS)
                versions = tuple(map(version, weights))
                samples = tuple(sample(w).clone() for w in weights)
                packed = Packed(weight, linear, weights, scales, versions, samples, apart)
            layers[layer] = replace(packed, apart=apart)
        return layers


@dataclass(frozen=True)
class Packed:
    """A packed weight, the layer that holds its bias, what it was made from, and the adapters beside it."""

    weight: Tensor
    linear: nn.Linear
    sources: tuple[Tensor, ...]
    scales: tuple[float, ...]
    versions: tuple[tuple[int, int], ...]
    samples: tuple[Tensor, ...]
    apart: "Factors"

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


def packed_linear(packed: Packed, hidden: Tensor) -> Tensor:
    """hidden [..., in] · Wᵀ + b, of a packed W, and the adapters that stay apart in the way that peft adds them."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed.weight, packed.linear.bias, "none", [], "")
    if not packed.apart:
        return product
    total = product
    for a, b, scale in packed.apart:
        total = total + nn.functional.linear(nn.functional.linear(hidden.to(a.dtype), a), b) * scale
    return total.to(product.dtype)


def packable_layers(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear, Factors]]:
    """Each layer that can be packed, the plain linear layer it is or wraps, and the adapters to merge into that."""
    adapters = active_adapters(module)
    linear: Any = module if adapters is None else module.get_submodule("base_layer")
    if type(linear) is nn.Linear and "forward" not in vars(module) and can_pack_weight(linear.weight):
        yield module, linear, adapters or []
        return
    for child in module.children():
        yield from packable_layers(child)


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
    """Whether weights of this dtype are rounded so far that adapters stay apart from them."""
    return dtype.itemsize < 4


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
