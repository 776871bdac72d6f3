"""The two halves of a causal language model: hidden states, and the output head that turns them into logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taurl.runtime.errors import InputError


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap(scale · (hidden · weightᵀ + bias)), softcap(z) = c · tanh(z / c) where the model has one.

    Attributes:
        weight: [V, d]; the input embedding itself where the model ties them.
        bias: [V] or None.
        scale: 1 for most models (Granite divides its logits, Cohere multiplies them).
        softcap: c, or None (Gemma 2 has one).
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d], in their dtype."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model itself, with its adapters in place, out of a `peft` wrapper if there is one."""
    wrapped: Any = model
    unwrapped: PreTrainedModel = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    return unwrapped


def body(model: PreTrainedModel) -> nn.Module:
    """The part that maps token ids to hidden states [..., d], everything but the output head."""
    base: nn.Module = causal_lm(model).base_model
    return base


def output_head(model: PreTrainedModel) -> OutputHead:
    """Read the output head off a causal language model of `transformers`, wrapped by `peft` or not."""
    plain: Any = causal_lm(model)
    linear, config = plain.get_output_embeddings(), plain.config.get_text_config()
    if type(linear) is not nn.Linear:
        raise InputError(
            f"the output head of {type(plain).__name__} is {type(linear).__name__}, expected a plain linear layer; "
            "leave the head out of the adapter's target modules"
        )
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:
        scale /= config.logits_scaling
    if getattr(config, "logit_scale", None) is not None:
        scale *= config.logit_scale
    return OutputHead(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))
