"""What surrounds an algorithm: objects given from Python, choices made on the machine, whole paths, the data."""

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch

from taurl.llm.models import attention
from taurl.llm.models.loading import names_embedded
from taurl.llm.rewards.model import PREFIX
from taurl.runtime.config import Settings, TrainingConfig, validated
from taurl.runtime.errors import InputError, reason
from taurl.runtime.machine import choose_device, choose_precision, make_current, out_of_memory_names, set_threads
from taurl.runtime.run import Run

Config = TypeVar("Config", bound=TrainingConfig)
NO_PATHS = ("copy", "head", "none", "chatml")  # words of settings that also take a path


def loading_model() -> AbstractContextManager[None]:
    """Names what to change where the model does not fit into memory."""
    return out_of_memory_names("the model's size (a smaller model, precision bfloat16, or lora_rank)")


def separate(config: Config, **given: Any) -> tuple[Config, dict[str, Any]]:
    """Put what was given by name into the config; return what was given as an object apart.

    Args:
        given: a name or path, an object, or None for what the config says; rewards may be one or several of either.
    Raises: InputError for a name that does not fit the other settings, and for a config in place of something else.
    """
    names: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:
            continue
        if isinstance(value, Settings):
            raise InputError(f"a {type(value).__name__} stands in the place of {key}: give it by name, as config=…")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if key == "rewards":
            value = (value,) if isinstance(value, str) or callable(value) else tuple(value)
            named = all(isinstance(item, str) for item in value)
            value = value or None
        else:
            named = isinstance(value, str)
        if value is not None:
            (names if named else objects)[key] = value
    if names:  # checked like those of a file: they may not fit the others
        config = validated(type(config), config.model_dump() | names, source="given from Python")
    return config, objects


def choose_machine(run: Run, *, keep_dtype: bool) -> tuple[torch.device, torch.dtype | None]:
    """Threads, device and dtype of the weights: what the run chose where it began, so that resuming repeats it.

    Args:
        keep_dtype: leave the weights as they are (None) unless the config names a precision.
    Raises: InputError where the device cannot be used, and where the run began on a GPU and there is none.
    """
    config, chosen = run.config, run.chosen
    assert isinstance(config, TrainingConfig)
    chosen["threads"] = set_threads(config.threads or chosen.get("threads"))
    device = device_of(run)
    make_current(device)
    if "precision" not in chosen:
        keep = keep_dtype and config.precision == "auto"
        chosen["precision"] = "" if keep else str(choose_precision(config.precision, device)).removeprefix("torch.")
    if device.type == "cpu" and chosen["precision"] != "float32":  # an object's own may be bfloat16
        known = {"whole_products": True, "bfloat16": False}.get(chosen.get("attention", ""))
        chosen["attention"] = "whole_products" if attention.choose(known) else "bfloat16"
    chosen["device"] = str(device)
    return device, getattr(torch, chosen["precision"]) if chosen["precision"] else None


def device_of(run: Run) -> torch.device:
    """The device that the config names, or the run began on, or chooses now."""
    config, began_on = run.config, run.chosen.get("device")
    assert isinstance(config, TrainingConfig)
    try:
        return choose_device(config.device if config.device != "auto" else began_on or "auto")
    except InputError as error:
        if began_on is None:
            raise
        why = reason(error.__cause__ or error)
        raise InputError(
            f"{run.directory}: the run began on {began_on}, which is not usable here ({why}); "
            "resume it on a machine that has it"
        ) from error


def with_whole_paths(config: Config, stored: Config | None = None) -> Config:
    """Paths that the config names relative to this folder made absolute, so that a run resumes from any folder.

    Functions that the stored config of a run names stay as they are there.
    """
    whole: dict[str, Any] = {}
    for name in ("model", "dataset", "eval_dataset", "chat_template", "reference", "critic"):
        value = getattr(config, name, None)
        if value is None or value in NO_PATHS or names_embedded(str(value)):
            continue
        if Path(value).exists():
            whole[name] = str(Path(value).resolve())
    if mix := getattr(config, "mix", None):
        whole["mix"] = {str(Path(name).resolve()) if Path(name).exists() else name: mix[name] for name in mix}
    known = (*getattr(stored, "rewards", ()), getattr(stored, "environment", None))
    rewards = getattr(config, "rewards", ())
    whole["rewards"] = tuple(spec if spec in known else whole_spec(spec) for spec in rewards)
    if (environment := getattr(config, "environment", None)) and environment not in known:
        whole["environment"] = whole_spec(environment)
    return config.model_copy(update=whole)


def whole_spec(spec: str) -> str:
    """A reward as `file.py:function`, `module:function` of this folder, or `model:FOLDER`, with its whole path."""
    if spec.startswith(PREFIX):
        name, bracket, settings = spec.removeprefix(PREFIX).partition("(")
        return f"{PREFIX}{Path(name).resolve() if Path(name).exists() else name}{bracket}{settings}"
    file, colon, function = spec.partition(".py:")
    if colon:
        return f"{Path(file).expanduser().resolve()}{colon}{function}"
    module, colon, function = spec.partition(":")
    here = Path.cwd() / f"{module}.py"
    if not colon or not here.is_file():
        return spec
    found = importlib.util.find_spec(module)
    return f"{here}:{function}" if found is None or found.origin == str(here) else spec


def repeat_weights(run: Run, kept: Iterable[torch.Tensor]) -> None:
    """Note where the run begins which weights it keeps as they are: below an adapter, the reference's, reward models'.

    They are in no checkpoint. A mark of them is taken from up to 64 numbers of each.
    Raises: InputError where the run resumes and finds others, since the model's folder was written again, or the hub
    has a new version.
    """
    mark = hashlib.sha256()
    for weight in kept:
        flat = weight.detach().flatten()
        some = flat[:: max(1, -(-len(flat) // 64))].cpu().contiguous()
        mark.update(f"{weight.dtype} {list(weight.shape)}".encode() + bytes(some.view(torch.uint8).numpy()))
    repeat_kept(run, "weights", mark.hexdigest())


def repeat_kept(run: Run, what: str, mark: str) -> None:
    """Note a mark of weights where the run begins. Raises: InputError where it resumes with another."""
    _repeat(
        run,
        what,
        mark,
        "the weights that the run keeps as they are, below its adapter, of its reference or of a reward model, are "
        "not those that it began with (was the model's folder written again?); resume with the same model",
    )


def repeat_data(run: Run, fingerprint: str) -> None:
    """Note the data's fingerprint where the run begins; InputError where it resumes with other data."""
    _repeat(
        run,
        "data",
        fingerprint,
        "the data is not what the run began with (other rows or order, another template, or a task whose rows differ "
        "from process to process: set PYTHONHASHSEED); resume with the same data",
    )


def _repeat(run: Run, what: str, mark: str, problem: str) -> None:
    if run.chosen.setdefault(what, mark) != mark:
        raise InputError(f"{run.directory}: {problem}")
