"""Checkpoints: a folder a step, which appears whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taurl.runtime.errors import RunError

MANIFEST = "manifest.json"


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in directory.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `checkpoints/step-000100/`: one safetensors file a group, the plain values in state.pt, and a manifest.

    All of it is written beside and renamed, so that a run killed meanwhile leaves no half checkpoint; then all but the
    newest `keep` are removed.

    Raises: RunError when writing fails (disk full); earlier checkpoints stay.
    """
    target, partial = folder(directory, step), directory / f".partial-{step:06d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for group, named in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, partial / f"{group}.safetensors")
        torch.save(dict(values), partial / "state.pt")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sizes": sizes}))
        for path in [*partial.iterdir(), partial]:
            flush_to_disk(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        steps = checkpoint_steps(directory)
        last = f"the last good one is {folder(directory, steps[-1])}" if steps else "there is no earlier one"
        raise RunError(
            f"{target}: the checkpoint could not be saved ({error}); {last}; free space, then resume"
        ) from error
    for old in checkpoint_steps(directory)[:-keep]:
        shutil.rmtree(folder(directory, old))
    return target


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(directory: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint back: tensors by group, and the plain values.

    Raises: RunError when it is not whole (a file missing, or of another size than the manifest says).
    """
    source = folder(directory, step)
    try:
        sizes = json.loads((source / MANIFEST).read_text())["sizes"]
        for name, size in sizes.items():
            if (found := (source / name).stat().st_size) != size:
                raise RunError(f"{source / name}: {found:,} bytes, expected {size:,}: the file is cut short")
        tensors = {path.stem: load_file(path) for path in sorted(source.glob("*.safetensors"))}
        return tensors, torch.load(source / "state.pt", weights_only=True)
    except RunError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{source}: not a whole checkpoint: {error}") from error
