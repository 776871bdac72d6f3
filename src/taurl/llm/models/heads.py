"""The two halves of a causal language model: hidden states, and the output head that turns them into logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taurl.runtime.errors import InputError

# What rounding may do to bfloat16 logits (two operations after the product); a head read wrongly is off by far more.
HEAD_TOLERANCE = 0.03


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
        """Logits [..., V] of hidden states [..., d]."""
        return self.finish(nn.functional.linear(hidden, self.weight, self.bias))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft cap, for what the linear layer gave: in float32 at least, where there is one."""
        if self.scale != 1 or self.softcap is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model itself, with its adapters in place, out of a `peft` wrapper if there is one.

    Raises: InputError for an adapter that lives in the wrapper (prompt and prefix tuning), which this would lose.
    """
    if not hasattr(model, "get_base_model"):
        return model
    wrapped: Any = model
    if wrapped.active_peft_config.is_prompt_learning:
        kind = wrapped.active_peft_config.peft_type.value
        raise InputError(f"the model has an adapter of type {kind}, expected one within its layers, such as LORA")
    unwrapped: PreTrainedModel = wrapped.get_base_model()
    return unwrapped


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens the model can see; None if its config does not say.

    Of a model with two sets of rotary factors (longrope: Phi-3, Phi-4-mini) as far as the first reaches: beyond, a
    longer row in a batch would turn the keys of all others.
    """
    config: Any = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") == "longrope" and rotary.get("original_max_position_embeddings"):
        return int(rotary["original_max_position_embeddings"])
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def known_tokens(model: PreTrainedModel) -> int:
    """How many tokens have an embedding; a tokenizer may know fewer, and some know more."""
    embeddings: Any = causal_lm(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def body(model: PreTrainedModel) -> nn.Module:
    """The part that maps token ids to hidden states [..., d], everything but the output head."""
    base: nn.Module = causal_lm(model).base_model
    return base


def output_head(model: PreTrainedModel) -> OutputHead:
    """Read the output head off a causal language model of `transformers`, wrapped by `peft` or not.

    Raises: InputError if it is not a plain linear layer.
    """
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


@torch.inference_mode()
def check_head(model: PreTrainedModel) -> None:
    """Compare `output_head(model)` on the hidden states of two tokens with the model's own logits.

    A head's scale and soft cap stand in the config under names that not all models share or mean alike.
    Raises: InputError if they disagree, or if the first token's hidden state changes with the second.
    """
    plain: Any = causal_lm(model)
    if body(plain) is plain:
        raise InputError(f"{type(plain).__name__} names no part without its output head: choose another model")
    ids = torch.tensor([[0, 1]], device=plain.device)
    with evaluating(plain):
        own = plain(input_ids=ids).logits
        hidden, head = body(plain)(input_ids=ids).last_hidden_state, output_head(plain)
        first = body(plain)(input_ids=ids[:, :1]).last_hidden_state
        fits = hidden.shape[-1] == head.weight.shape[-1]  # else the model does something in between
    if not fits or (head(hidden) - own).abs().max() > HEAD_TOLERANCE * own.abs().max():
        raise InputError(
            f"{type(plain).__name__} does more to its logits than taurl knows (a linear layer, a scale, a soft cap): "
            "its log-probabilities would be wrong, choose another model"
        )
    if (hidden[:, :1] - first).abs().max() > HEAD_TOLERANCE * first.abs().max():
        raise InputError(f"{type(plain).__name__} sees the tokens that follow: choose a causal language model")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, and no gradient checkpointing, which would drop keys and values."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
