"""Checkpoints: a folder a step, which appears whole or not at all."""

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taurl.runtime.errors import InputError, RunError, reason
from taurl.runtime.files import flush_to_disk

MANIFEST, STATE = "manifest.json", "state.pt"

Content = TypeVar("Content")


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in directory.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def last_good(directory: Path) -> str:
    """In words, where to go on from."""
    steps = checkpoint_steps(directory)
    return f"the last good checkpoint is {folder(directory, steps[-1])}" if steps else "there is no checkpoint yet"


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `checkpoints/step-000100/`: one safetensors file a group, the plain values in state.pt, and a manifest.

    All of it is written beside and renamed, so that a run killed meanwhile leaves no half checkpoint; then all but the
    newest `keep` are removed.

    Raises: RunError when writing fails (disk full); earlier checkpoints stay.
    """
    target, partial = folder(directory, step), directory / f".partial-{step:06d}"
    if (target / MANIFEST).exists():  # whole, and of this very step: a run that resumes removes those past its step
        return target
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for group, named in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, partial / f"{group}.safetensors")
        # By way of memory: writing to the file itself, torch.save reports a full disk as an internal error.
        state = io.BytesIO()
        torch.save(dict(values), state)
        (partial / STATE).write_bytes(state.getvalue())
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sizes": sizes}))
        for path in [*partial.iterdir(), partial]:
            flush_to_disk(path)
        partial.rename(target)
        flush_to_disk(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"{target}: the checkpoint could not be saved ({reason(error)}); {last_good(directory)}; "
            "free space, then resume"
        ) from error
    for old in checkpoint_steps(directory)[:-keep]:
        shutil.rmtree(folder(directory, old), ignore_errors=True)
    return target


def load_checkpoint(directory: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint back: tensors by group, and the plain values.

    Raises: RunError naming the file that is missing, damaged, or of another size than the manifest says; InputError
        for one that cannot be read for another reason.
    """
    source = folder(directory, step)
    sizes = _read(source / MANIFEST, lambda path: dict(json.loads(path.read_text())["sizes"]))
    for name, size in sizes.items():
        found = _read(source / name, lambda path: path.stat().st_size)
        if found != size:
            raise RunError(f"{source / name}: {found:,} bytes, expected {size:,}: the file is cut short")
    tensors = {path.stem: _read(path, load_file) for path in sorted(source.glob("*.safetensors"))}
    return tensors, _read(source / STATE, lambda path: dict(torch.load(path, weights_only=True)))


def _read(path: Path, reader: Callable[[Path], Content]) -> Content:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise RunError(f"{path}: missing") from error
    except (OSError, MemoryError) as error:  # the file may be whole: nothing is to be removed for that
        raise InputError(f"{path}: cannot be read ({reason(error)}); resume when it can") from error
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        raise RunError(f"{path}: damaged ({type(error).__name__})") from error


def discard_leftovers(directory: Path, *, after: int) -> None:
    """Remove what a killed run left half written, and the checkpoints past the step from which the run goes on.

    Those were damaged; left in place they would count among the newest that are kept.
    """
    for path in directory.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
    for step in checkpoint_steps(directory):
        if step > after:
            shutil.rmtree(folder(directory, step), ignore_errors=True)
