"""Model names, and models and tokenizers loaded from them: safetensors only, no code from the model's folder."""

from __future__ import annotations

import difflib
import importlib.util
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from taurl.llm.models import embedded
from taurl.llm.models.attention import attending_as_chosen
from taurl.llm.models.hub import hub_problem, quiet_transformers
from taurl.runtime.errors import InputError, one_line
from taurl.runtime.machine import is_out_of_memory

MODEL_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json")
Head: TypeAlias = Literal["language", "sequence", "token"]
"""What a model ends in: logits of the next token, or one score for the sequence or for each token."""
HEAD_CLASSES: dict[Head, tuple[Any, dict[str, Any]]] = {
    "language": (AutoModelForCausalLM, {}),
    "sequence": (AutoModelForSequenceClassification, {"num_labels": 1}),
    "token": (AutoModelForTokenClassification, {"num_labels": 1}),
}
SCORE_KINDS: dict[str, Head] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "SEQ_CLS": "sequence",  # peft's names
    "TOKEN_CLS": "token",
}
SCORE_HEADS = ("score.", "classifier.")  # how the architectures call a layer that gives scores
HOW_TO_NAME = f"give a folder, '{embedded.NAME}' or a hub name (owner/name)"


def resolve_model(name: str) -> str:
    """The local folder of a model, fetched if need be.

    A name is, in this order: a local folder with a config.json (or adapter_config.json); the embedded model, in any
    case; a hub name. The hub is asked once; where it does not answer, an already cached snapshot is taken.
    Raises: InputError (one line) for a name that is none of these; RunError if the embedded model cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and _holds_model(folder):
        return str(folder)
    if names_embedded(name):
        return str(embedded.embedded_model())
    if folder.is_dir():
        raise InputError(
            f"model folder '{name}' holds no config.json or adapter_config.json; {HOW_TO_NAME}{_hint(folder)}"
        )
    if folder.is_file():
        raise InputError(f"model '{name}' is a file; give the folder that holds its config.json")
    if _looks_like_path(name):
        raise InputError(f"no such model folder: '{name}'; {HOW_TO_NAME}")
    if "/" not in name and difflib.get_close_matches(name.lower(), [embedded.NAME], cutoff=0.7):
        raise InputError(f"unknown model '{name}': did you mean '{embedded.NAME}'?")
    return _fetch_from_hub(name)


def names_embedded(name: str) -> bool:
    """Whether the embedded model is meant, and no model folder that has its name."""
    return name.lower() == embedded.NAME and not _holds_model(Path(name))


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_adapter(folder)


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds a LoRA (or other) adapter as peft writes it."""
    return (Path(folder) / "adapter_config.json").is_file()


def _hint(folder: Path) -> str:
    within = [child for child in sorted(folder.iterdir()) if child.is_dir() and _holds_model(child)]
    return f" (did you mean '{within[-1]}'?)" if within else ""


def _looks_like_path(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return (
        not name
        or name[0] in "/~."
        or "\\" in name
        or parts[-1] == ""
        or len(parts) > 2
        or name.endswith(MODEL_SUFFIXES)
    )


def _fetch_from_hub(name: str) -> str:
    """The folder of a hub repository's snapshot, with the files that a model here can be made of."""
    from huggingface_hub import snapshot_download

    reason = hub_problem(name, "model")
    try:
        return snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
            ignore_patterns=["*/*", "consolidated*"],  # the same weights again, in other formats
            local_files_only=reason is not None,
        )
    except Exception as error:  # the HTTP client's own classes, the hub's, and the disk's
        if Path(name).parent.name and Path(name).parent.is_dir():  # `runs/demmo` where there is a folder runs
            raise InputError(f"no such model folder: '{name}'; {HOW_TO_NAME}") from error
        because = reason or one_line(error)
        raise InputError(
            f"model '{name}': no folder, and not to be had from the hub ({because}); {HOW_TO_NAME}"
        ) from error


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    in_4bit: bool = False,
    head: Head = "language",
    new_head: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, or one that gives scores, in eval mode.

    For a folder that peft wrote, the base model it names with its adapter on top: a `PeftModel`, which answers to
    everything that is asked of a `PreTrainedModel` here, with the adapter not trainable.

    Args:
        in_4bit: keep the linear layers but the output head in 4 bits (NF4); `dtype` is then what they compute in.
        new_head: a model that has no layer for scores gets one, drawn from torch's generator.
    Raises: InputError if the name resolves to nothing, weights are not safetensors, damaged, or do not fill the whole
    model, or where 4 bits need what is not here.
    """
    quantization = _four_bits(dtype, torch.device(device)) if in_4bit else {}
    path = resolve_model(str(name_or_path))
    if head == "language" and written_head(Path(path))[0] != "language":
        raise InputError(f"model '{name_or_path}' gives scores, it is a reward model; give a language model here")
    if is_adapter(path):
        if in_4bit:
            raise InputError(f"'{name_or_path}' is an adapter already; load_in_4bit takes a model to put a new one on")
        return _load_adapter(path, dtype=dtype, device=device, head=head)
    auto_class, options = HEAD_CLASSES[head]
    with quiet_transformers():
        try:
            loaded: Any = auto_class.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **quantization,
                **options,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise InputError(f"model '{name_or_path}' cannot be loaded: {one_line(error)}") from error
    model, report = loaded
    # transformers fills what is missing with random numbers and a warning; nobody means to train from a random layer.
    missing = sorted(report["missing_keys"])
    if head != "language" and new_head:
        missing = [name for name in missing if not name.startswith(SCORE_HEADS)]
    if missing:
        raise InputError(
            f"model '{name_or_path}' lacks {len(missing)} weights, {missing[0]} first; "
            "its folder is incomplete or its config.json belongs to another model"
        )
    return attending_as_chosen(model.eval() if in_4bit else model.eval().to(device))


def written_head(folder: Path) -> tuple[Head, str]:
    """What the model in a folder ends in, and what its configuration says that it is.

    One that cannot be read passes for a language model: who loads it says what is wrong.
    """
    adapter = is_adapter(folder)
    try:
        file = folder / ("adapter_config.json" if adapter else "config.json")
        written = json.loads(file.read_text(encoding="utf-8"))
        names = [str(written.get("task_type"))] if adapter else [*map(str, written.get("architectures") or [])]
        own_head = {"score", "classifier"} & set((adapter and written.get("modules_to_save")) or ())
    except (OSError, ValueError, AttributeError, TypeError):
        return "language", "of a kind that cannot be read"
    heads = [head for name in names for ending, head in SCORE_KINDS.items() if name.endswith(ending)]
    if names == ["None"] and own_head:  # an adapter that does not say its task, but brings a head
        heads = ["sequence"]
    return heads[0] if heads else "language", ", ".join(names)


def _four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs for 4 bits. Raises: InputError without a GPU or the package bitsandbytes."""
    if device.type != "cuda":
        raise InputError(f"load_in_4bit needs a GPU with CUDA, and the device is {device}; train without it")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "load_in_4bit needs the package bitsandbytes: in taurl's folder, pip install -e '.[bitsandbytes]'"
        )
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def load_outline(name_or_path: str | Path) -> PreTrainedModel:
    """A model as `load_model` would load it, but for its weights, which take no memory: for a look at what it takes.

    Raises: InputError if there is none.
    """
    path = resolve_model(str(name_or_path))
    if is_adapter(path):
        path = resolve_model(_adapter_base(path))
    factory: Any = AutoModelForCausalLM
    with quiet_transformers(), torch.device("meta"):
        try:
            model = factory.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
            if (Path(path) / "generation_config.json").is_file():
                with suppress(OSError, ValueError):  # as where the weights are loaded, a damaged one counts for nothing
                    model.generation_config = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise InputError(f"model '{name_or_path}' cannot be loaded: {one_line(error)}") from error
    return cast(PreTrainedModel, model)


def _load_adapter(path: str, **options: Any) -> PreTrainedModel:
    from peft import PeftModel

    base_name = _adapter_base(path)
    if not (Path(path) / "adapter_model.safetensors").is_file():
        raise InputError(f"adapter '{path}' has no adapter_model.safetensors; save it again with safetensors")
    if Path(base_name).is_dir() and is_adapter(base_name):
        raise InputError(
            f"adapter '{path}' stands on another adapter, '{base_name}'; merge that one into its base model first"
        )
    try:
        base = load_model(base_name, **options, new_head=True)  # the adapter brings its own
    except InputError as error:
        raise InputError(f"adapter '{path}' needs its base model: {error}") from error
    try:
        with quiet_transformers():
            adapted: Any = PeftModel.from_pretrained(base, path).eval()
            adapted.loaded_from = path  # its config is its base's, which knows the base's folder alone
            return cast(PreTrainedModel, adapted)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"adapter '{path}' cannot be put on '{base_name}': {one_line(error)}") from error


def origin(model: Any) -> str:
    """The folder or name that a model object was loaded from, of an adapter its own; empty where it is not known."""
    return str(getattr(model, "loaded_from", None) or model.config.name_or_path or "")


def _adapter_base(path: str) -> str:
    file = Path(path) / "adapter_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged: {one_line(error)}") from error
    if not isinstance(name, str) or not name:
        raise InputError(f"{file} names no base model (base_model_name_or_path is {name!r})")
    if Path(name).is_absolute() and not Path(name).exists() and Path(name).parts[-2:] == ("models", embedded.NAME):
        return embedded.NAME  # in the cache of another machine
    if _looks_like_path(name) and not Path(name).expanduser().exists():
        raise InputError(
            f"adapter '{path}' stands on the model in '{name}', which is not there; put it back, or write the place "
            f"where it is into {file}"
        )
    return name


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a pad token set that is not the end of sequence where there is such a one.

    Raises: InputError if there is none to load.
    """
    path = resolve_model(str(name_or_path))
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = resolve_model(_adapter_base(path))
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception on a file that it cannot parse
            if not any(any(Path(path).glob(pattern)) for pattern in ("*token*", "vocab*", "*.model")):
                raise InputError(
                    f"model folder '{name_or_path}' holds no tokenizer: save it there too (tokenizer.save_pretrained)"
                ) from error
            raise InputError(f"tokenizer of '{name_or_path}' cannot be loaded: {one_line(error)}") from error
    set_pad_token(tokenizer)
    return cast(PreTrainedTokenizerBase, tokenizer)


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad token: the one there is, another made for it, the unknown token, and only then the end of sequence."""
    named = [token for token in tokenizer.all_special_tokens if "pad" in token.lower()]
    candidates = [tokenizer.pad_token, *named, tokenizer.unk_token]
    apart = [token for token in candidates if token is not None and token != tokenizer.eos_token]
    tokenizer.pad_token = apart[0] if apart else tokenizer.eos_token
