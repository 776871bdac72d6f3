"""What a reward function is given, what it may return, and one call of it."""

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from taurl.llm.rewards.specs import explain, line_in, parameters_of
from taurl.runtime.errors import RunError, shorten

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every reward function can have, whatever the columns of the rows are."""
NOT_HANDED_ON = frozenset({"prompt", "completion", "prompts", "completions"})
"""Columns of the rows that no function gets: what is asked and answered comes as `prompts` and `completions`."""


class RewardFailure(Exception):
    """A call of a reward function that gave no usable values.

    Args:
        reason: what happened, to follow the function's name.
        row: index in the batch of the row at fault, where the call told it.
        kind: equal for two failures of the same sort; empty where calling again would not tell the row.
    """

    def __init__(self, reason: str, row: int | None = None, kind: str = ""):
        super().__init__(reason, row, kind)  # as arguments, so that it survives pickling
        self.reason, self.row, self.kind = reason, row, kind


# What samples.jsonl says of each completion by itself.
OF_A_SAMPLE = {
    "step", "kind", "row", "prompt", "completion", "finish", "tokens", "answer", "reward", "rewards", "advantage",
}  # fmt: skip


# What a step's record says by itself.
OF_A_RECORD = ("step", "seconds", "time/", "eval/", "memory/")


@dataclass
class Result:
    """One function's values for a batch of N rows."""

    values: list[float]
    """[N], NaN where the function does not apply."""
    seconds: float
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class Recorder:
    """Receives what a function says with `log_metric` and `log_extra`, and makes its result."""

    def __init__(self, count: int):
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}
        self.started = time.perf_counter()

    def log_metric(self, name: str, value: Any) -> None:
        if name in OF_A_RECORD or name.startswith(tuple(own for own in OF_A_RECORD if own.endswith("/"))):
            raise RewardFailure(f"calls log_metric({name!r}, …): a step's record has that; give it another name")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        values = list(values)
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}, …) was given {len(values)} values for {self.count} rows")
        if column in OF_A_SAMPLE:
            raise RewardFailure(f"calls log_extra({column!r}, …): a sample has that already; give it another name")
        self.extra[column] = values

    def arguments(self, function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
        return select(function, {**offered, "log_metric": self.log_metric, "log_extra": self.log_extra})

    def result(self, returned: Any) -> Result:
        seconds = time.perf_counter() - self.started
        return Result(checked_values(returned, self.count), seconds, self.metrics, self.extra)


def evaluate(function: Callable[..., Any], offered: Mapping[str, Any], count: int) -> Result:
    """Call a function once. Raises RewardFailure, from the function's own exception if there was one."""
    recorder = Recorder(count)
    with _failing_as(function):
        returned = _listed(function(**recorder.arguments(function, offered)))
    return recorder.result(returned)


async def evaluate_async(function: Callable[..., Any], offered: Mapping[str, Any], count: int) -> Result:
    """The same for an async function."""
    recorder = Recorder(count)
    with _failing_as(function):
        returned = _listed(await function(**recorder.arguments(function, offered)))
    return recorder.result(returned)


@contextlib.contextmanager
def _failing_as(function: Callable[..., Any]) -> Iterator[None]:
    try:
        yield
    except (RewardFailure, RunError):  # the second: of memory, which is no fault of the rows
        raise
    except (Exception, SystemExit) as error:
        raise failure_of(error, function) from error


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def select(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of the named arguments offered, those that the function accepts: all of them if it takes `**kwargs`."""
    parameters = parameters_of(function)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: offered[name] for name in parameters if name in offered}


def required_columns(function: Callable[..., Any]) -> list[str]:
    """The parameters without a default that are not among `GIVEN`: columns that the rows must have."""
    return [
        p.name
        for p in (parameters_of(function) or {}).values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in GIVEN
    ]


def checked_values(returned: Any, count: int) -> list[float]:
    """Floats [count], NaN for None, from what a function returned. Raises RewardFailure otherwise."""
    if not isinstance(returned, list):
        raise RewardFailure(f"returned a {type(returned).__name__}, expected a list of {count} numbers or None")
    if len(returned) != count:
        kind = "too few" if len(returned) < count else "too many"
        raise RewardFailure(f"returned {len(returned)} values for {count} completions", kind=kind)
    return [_checked_value(value, row) for row, value in enumerate(returned)]


def failure_of(error: BaseException, function: Callable[..., Any]) -> RewardFailure:
    """What an exception inside a function becomes: its type, message and the function's own line."""
    code = getattr(inspect.unwrap(function), "__code__", None) or getattr(type(function).__call__, "__code__", None)
    line = line_in(error, code.co_filename) if code else None
    place = f" at {code.co_filename}:{line}" if code and line else ""
    # Of a connection (Python's own, or what clients call so) or of memory: no row is at fault, and asking may be dear.
    kinds = [kind.__name__ for kind in type(error).__mro__]
    elsewhere = any("Connection" in kind or kind == "MemoryError" for kind in kinds)
    return RewardFailure(f"raised {explain(error)}{place}", kind="" if elsewhere else type(error).__name__)


def _checked_value(value: Any, row: int) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "item"):
        with contextlib.suppress(ValueError, RuntimeError):
            value = value.item()  # a scalar of numpy or torch
    if not isinstance(value, Real):
        raise RewardFailure(f"returned {shorten(repr(value), 60)}, expected a number or None", row)
    if not math.isfinite(value):
        raise RewardFailure(f"returned {value}, expected a finite number, or None where it does not apply", row)
    return float(value)


def _listed(returned: Any) -> Any:
    # A generator runs its body here, so this belongs to the call.
    return list(returned) if isinstance(returned, Iterable) and not isinstance(returned, str | Mapping) else returned
