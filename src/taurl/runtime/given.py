"""What a run was given from Python: configs, changed settings, and objects, which are asked for again on resume."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from taurl.runtime.config import RunConfig, validated
from taurl.runtime.errors import InputError
from taurl.runtime.run import GIVEN, Run

Config = TypeVar("Config", bound=RunConfig)


def own_config(config: object, kind: type[Config]) -> Config:
    """The config, if it is of this class. Raises: InputError for that of another algorithm, or of none."""
    if not isinstance(config, kind):
        found, expected = (f"{one.__module__}.{one.__qualname__}" for one in (type(config), kind))
        raise InputError(f"config is a {found}, expected a {expected}")
    return config


def own_callbacks(callbacks: object) -> Any:
    """The functions to call with each record. Raises: InputError for one that is no list of them."""
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise InputError(f"callbacks is {callbacks!r}, expected a list of functions of a record")
    return callbacks


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A config with some settings changed. Raises: InputError for values that do not fit, alone or together."""
    if not changes:
        return config
    return validated(type(config), config.model_dump() | dict(changes), source="given from Python")


def require_given_again(run: Run, objects: Iterable[str]) -> None:
    """Refuse to resume without an object that the run was started with, or with one that it was not."""
    before, now = set(run.environment.get(GIVEN, [])), set(objects)
    for key in sorted(before - now):
        raise InputError(
            f"{run.directory}: its {key} came from Python as an object; resume from Python and give it again"
        )
    for key in sorted(now - before):
        raise InputError(
            f"{run.directory}: its {key} did not come from Python as an object, and another one would alter the past; "
            "leave it out"
        )
