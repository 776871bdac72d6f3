"""Which directory a run may have, with which settings it may go on there, what it notes about its surroundings,
and its result."""

import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from taurl import __version__
from taurl.runtime.config import RunConfig, free_on_resume, why_not_on_resume
from taurl.runtime.errors import InputError, RunError, reason
from taurl.runtime.machine import describe_machine


def unused(directory: Path) -> Path:
    """This directory, or with -2, -3, … where there is one already: runs that begin in one second."""
    names = itertools.chain([directory], (directory.with_name(f"{directory.name}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def refuse_taken(directory: Path) -> None:
    """Raises: InputError when a new run cannot have this directory."""
    try:
        taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
        is_run = taken and (directory / "config.yaml").exists()
    except OSError as error:
        raise InputError(f"{directory}: cannot be read ({reason(error)}); give another directory with out") from error
    if taken:
        found = "a file" if not directory.is_dir() else "a directory with files in it"
        if is_run:
            begun = (directory / "metrics.jsonl").exists() or (directory / "checkpoints").exists()
            found = "a run; resume it" if begun else "a run without a step yet; resume it, remove it if it has failed"
        raise InputError(f"{directory} exists already, {found}, or give another directory with out")


def claim(directory: Path, *, unnamed: bool) -> Path:
    """Make the directory of a new run; where nobody named it, a further one if another run took it meanwhile.

    Raises: InputError when it is taken, or cannot be created.
    """
    while True:
        if unnamed:
            directory = unused(directory)
        else:
            refuse_taken(directory)
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(exist_ok=not unnamed)
            return directory
        except OSError as error:
            if not (unnamed and os.path.lexists(directory)):  # which was not there before
                raise InputError(f"{directory}: cannot be created ({reason(error)}); give another out") from error


def refuse_other_past(directory: Path, stored: RunConfig, config: RunConfig) -> None:
    """Raises: InputError when resuming with this config would alter what the run has computed with the stored one."""
    for name in config.changed_from(stored):
        if not free_on_resume(type(config), name):
            raise InputError(
                f"{directory}: {name} was {getattr(stored, name)!r} and cannot become {getattr(config, name)!r} "
                f"on resume: {why_not_on_resume(type(config), name)}"
            )
    if config.out not in (None, stored.out, directory):
        raise InputError(f"{directory}: a resumed run stays where it is, but out is {config.out}; leave it out")
    if config.steps != stored.steps and (spread := config.spread_over_steps):
        raise InputError(
            f"{directory}: steps was {stored.steps} and cannot become {config.steps}: what spreads over all steps "
            f"({spread}) would have made those already taken others; start a new run (one without it can be given more "
            "steps later)"
        )


def read_environment(directory: Path) -> dict[str, Any]:
    """The facts noted when the run began; empty if they are missing."""
    path = directory / "environment.json"
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a JSON object ({reason(error)})") from error


def require_algorithm(directory: Path, algorithm: str) -> None:
    """Raises: InputError when the run in this directory is one of another algorithm."""
    found = read_environment(directory).get("algorithm", algorithm)
    if found != algorithm:
        raise InputError(f"{directory}: a run of {found}, not of {algorithm}; resume it with {found}")


def describe_environment(known: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run already, with the time it began, and what runs it now: packages, machine, command."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **known,
        "taurl": __version__,
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        **describe_machine(),
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write_folder(folder: Path, export: Callable[[Path], None]) -> None:
    """Write a run's `final/` or `best/`, whole or not at all. Raises: RunError when it cannot be written."""
    partial, before = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "before"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        export(partial)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)  # until the new one is there
        partial.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder}: the model could not be written ({reason(error)}); free space, then --resume {folder.parent}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing, once it is the folder
