"""Tiny random language models of several architectures, and a mode that keeps a double model in float64."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 101
CONTEXT = 128
WINDOW = 6  # shorter than every sequence of the tests, so that it matters

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Far wider than usual: logits with a clear shape, where the tokens of the usual start repeat at once.
    "initializer_range": 0.25,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA: dict[str, Any] = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "num_hidden_layers": 3,
    "layer_types": _MIXED,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,  # tied and random, it only ever repeats its last token
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_GPT2 = {_GPT2_NAMES.get(name, name): value for name, value in _SIZES.items() if name != "num_key_value_heads"}

_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES | _GEMMA),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=WINDOW),
    "phi": lambda: PhiConfig(**_SIZES, partial_rotary_factor=0.5),
    "smollm3": lambda: SmolLM3Config(
        **_SIZES | {"num_hidden_layers": 4},  # the last one without rotary embedding
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "gemma2": lambda: Gemma2Config(**_SIZES | _GEMMA, final_logit_softcapping=4.0, attn_logit_softcapping=3.0),
    "granite": lambda: GraniteConfig(**_SIZES, logits_scaling=0.7, attention_multiplier=0.3, residual_multiplier=0.8),
    "cohere": lambda: CohereConfig(**_SIZES, logit_scale=1.7),
}
ARCHITECTURES = tuple(_CONFIGS)


def tiny_model(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """A random model in evaluation mode, the same each time; sdpa attention where it has that (Gemma 2 has not)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(_CONFIGS[name](), attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at 0 or 1, where a mistake would not show
                parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


class StayDouble(TorchFunctionMode):
    """Ignores casts of float64 tensors to float32, which transformers makes in norms, rotary embedding and softmax."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.to or function in _SOFTMAXES:
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                kwargs |= {name: torch.float64 for name, value in kwargs.items() if value is torch.float32}
        return function(*args, **kwargs)


_SOFTMAXES = (torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax)


def in_double(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test under `StayDouble`."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with StayDouble():
            test(*args, **kwargs)

    return run


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on, in training mode without dropout. Computing again in backward stays double."""
    plain: Any = model
    options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), StayDouble())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a new name from transformers 5.23 on
        plain.gradient_checkpointing_enable(options)
    plain.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def logits_one_by_one(model: PreTrainedModel, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Logits [L, V] of each sequence, each forwarded alone, without padding or cache."""
    plain: Any = model
    return [plain(input_ids=torch.tensor([sequence]), use_cache=False).logits[0] for sequence in sequences]
