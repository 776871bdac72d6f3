"""Rows from reasoning-gym's procedural tasks: questions with exact answers that need no download."""

from __future__ import annotations

import dataclasses
import difflib
import time
import typing
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from taurl.runtime.errors import InputError, one_line

PREFIX = "reasoning-gym:"
DEFAULT_SIZE = 5000
PATIENCE = 10.0  # seconds after which a slow generator says that it is at work


def reasoning_rows(task: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`size` rows (5,000 unless given) of a task: prompt and question (the same text), answer, metadata.

    `arguments` go to the task's own config; text from a command line is read as that config's types. `seed` is 0 unless
    given, where reasoning-gym would draw one. Its item i is made from seed + i, so lists of neighbouring seeds overlap:
    held-out questions come from `split`, not from another seed. Tasks that walk over sets of strings (`word_ladder`,
    `isomorphic_strings`, `ransom_note` among them) give other rows in another process unless PYTHONHASHSEED is set.

    Raises: InputError for an unknown task or argument, or a value that the task refuses.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    name = PREFIX + task
    if task not in DATASETS:
        close = difflib.get_close_matches(task, list(DATASETS), n=3) or [*sorted(DATASETS)[:3], "…"]
        raise InputError(f"reasoning-gym has no task '{task}'; closest: {', '.join(close)} ({len(DATASETS)} tasks)")
    settings = {"size": DEFAULT_SIZE, "seed": 0} | _typed(name, DATASETS[task][1], arguments)
    try:
        items = create_dataset(task, **settings)
    except Exception as error:  # the tasks check their config with assert, and with whatever else comes to hand
        raise InputError(f"{name} refuses {_written(arguments) or 'its own defaults'}: {one_line(error)}") from error
    rows = []
    patient_until = time.monotonic() + PATIENCE
    for index in range(settings["size"]):
        try:
            item = items[index]
        except Exception as error:
            raise InputError(
                f"{name} fails at item {index} with {_written(settings)}: {one_line(error)}; try another seed"
            ) from error
        rows.append({"prompt": item["question"], **{key: item[key] for key in ("question", "answer", "metadata")}})
        if time.monotonic() > patient_until:
            Console(stderr=True, highlight=False).print(
                f"{name} is slow to generate: {index + 1:,} of {settings['size']:,} rows after {PATIENCE:.0f} s "
                "(the argument size sets how many)"
            )
            patient_until = float("inf")
    return rows


def _typed(name: str, config: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the types that the task's config declares."""
    types = typing.get_type_hints(config)
    fields = [field.name for field in dataclasses.fields(config) if field.init]
    typed = {}
    for key, value in arguments.items():
        if key not in fields:
            raise InputError(f"{name} has no argument '{key}'; it has {', '.join(fields)}")
        adapter = TypeAdapter(types[key])
        try:
            typed[key] = adapter.validate_python(value)
            continue
        except ValidationError as error:
            reason = one_line(error.errors()[0]["msg"])
        try:
            if not isinstance(value, str):
                raise ValueError
            typed[key] = adapter.validate_python(yaml.safe_load(value))  # a list or a null on the command line
        except (ValueError, yaml.YAMLError):
            raise InputError(f"{name}: argument {key}={value!r}: {reason}") from None
    return typed


def _written(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in arguments.items())
