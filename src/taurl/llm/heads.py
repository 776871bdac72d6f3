"""The two halves of a causal language model: hidden states, and the output head that turns them into logits."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal language model itself, with its adapters in place, out of a `peft` wrapper if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: nn.Module) -> nn.Module:
    """The part that maps token ids to hidden states [..., d], everything but the output head."""
    return causal_lm(model).base_model


def output_head(model: nn.Module) -> OutputHead:
    """Read the output head off a causal language model of `transformers`, wrapped by `peft` or not."""
    model = causal_lm(model)
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(linear) is not nn.Linear:
        raise InputError(
            f"the output head of {type(model).__name__} is {type(linear).__name__}, expected a plain linear layer; "
            "leave the head out of the adapter's target modules"
        )
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:
        scale /= config.logits_scaling
    if getattr(config, "logit_scale", None) is not None:
        scale *= config.logit_scale
    return OutputHead(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))
