"""Norms and feed-forward parts of a model's layers compiled by `torch.compile`, for the passes of training."""

import os
import shutil
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from taurl.llm.models.embedded import cache_folder
from taurl.runtime.errors import InputError

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_layers(model: nn.Module, device: torch.device) -> str:
    """Have what stands beside attention in each layer compiled when training first passes through it.

    Elementwise work is then done in fewer passes over memory, and less of it is kept for the backward pass. One
    compilation of a kind of module serves all layers and shapes, but for a length or a number of rows of 1, which takes
    its own, and so do passes without a gradient. These are compiled too, since they round otherwise than plain ones:
    in bfloat16 the ratios of a first update would not be 1. Attention keeps its cache of keys and values, which does
    not compile; sampling and scoring, which run in inference mode, stay as they are.

    Without a compiler nothing is compiled: the result is the same up to rounding, only later.

    Returns: a line for the log, which says where compiled code is kept for the next run, or what is missing.
    Raises: InputError where the model has no layers that are known as such.
    """
    parts = parts_beside_attention(model)
    if not parts:
        raise InputError(f"compile_layers: {type(model).__name__} has no layers that can be compiled; leave it out")
    language, compilers = compilers_for(device)
    if not any(map(shutil.which, compilers)):
        missing = f"compile_layers needs a {language} compiler, found no {' or '.join(compilers)}"
        return f"{missing}: the layers are not compiled, which is slower"
    # One function serves policy, critic and reference, each with and without a gradient, and for one row: what is
    # beyond the limit would run plain.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    kept = os.environ.setdefault(CACHE_VARIABLE, str(cache_folder() / "compiled"))
    forwards = {kind: compiled_in_training(kind) for kind in {type(part) for part in parts}}
    for part in parts:
        part.forward = MethodType(forwards[type(part)], part)
    return f"the first step compiles parts of the layers, half a minute or more; kept for later runs in {kept}"


def compilers_for(device: torch.device) -> tuple[str, list[str]]:
    """The language of what is compiled here, and the compilers that are looked for, one of which is enough.

    On a GPU Triton makes its kernels by itself, and what launches them in C.
    """
    if device.type == "cuda":
        return "C", [named] if (named := os.environ.get("CC")) else ["gcc", "clang"]
    return "C++", [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]


def parts_beside_attention(model: nn.Module) -> list[nn.Module]:
    """The modules of each decoder layer that do not belong to its attention, which alone knows the layer's number."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [part for layer in layers for part in layer.children() if not hasattr(part, "layer_idx")]


def compiled_in_training(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward function of a kind of module: plain in inference mode, and compiled elsewhere."""
    plain: Callable[..., Any] = kind.forward
    compiled = torch.compile(plain, dynamic=True)

    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        return (plain if torch.is_inference_mode_enabled() else compiled)(self, *arguments, **keywords)

    FORWARDS.add(forward)
    return forward


FORWARDS: set[Callable[..., Any]] = set()  # what `compiled_in_training` gave in this process


def as_its_class_says(module: nn.Module) -> bool:
    """Whether a module computes, in inference mode, what its class does: no other function was put in its place."""
    own = vars(module).get("forward")
    return own is None or getattr(own, "__func__", own) in FORWARDS
