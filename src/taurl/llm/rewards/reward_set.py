"""Several reward functions, called together on a batch of completions and added up."""

import asyncio
import difflib
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from taurl.llm.rewards.contract import (
    NOT_HANDED_ON,
    Result,
    RewardFailure,
    evaluate,
    evaluate_async,
    is_async,
    required_columns,
    select,
)
from taurl.llm.rewards.model import reward_model
from taurl.llm.rewards.specs import Spec, callable_name, load, parse
from taurl.llm.rewards.text import content_of, text_of
from taurl.llm.rewards.worker import Worker
from taurl.llm.settings import RewardSettings
from taurl.runtime.errors import InputError, shorten

EXCERPT = 80  # characters of a prompt or completion that an error shows


@dataclass
class Scores:
    """The rewards of N completions by F functions."""

    values: np.ndarray
    """float64 [N, F], NaN where a function returned None: it does not apply to that row."""
    total: np.ndarray
    """float64 [N], the weighted sum over the functions that apply; NaN where none does."""
    seconds: dict[str, float]
    metrics: dict[str, float]
    """The mean of what functions passed to `log_metric(name, value)` during this call."""
    extra: dict[str, list[Any]]
    """Columns [N] that functions passed to `log_extra(column, values)`."""


class RewardSet:
    """Reward functions with weights.

    A function is called by keyword with `prompts`, `completions`, `completion_ids`, every column, `trainer_state`,
    `log_extra` and `log_metric`, or with those of them that it names, and returns N numbers or None ("does not apply").
    Synchronous ones run in order; async ones run together on one event loop that lives as long as the set, so that what
    they keep between batches (HTTP clients) stays usable.

    Args:
        functions: functions, what `specs.parse` understands, or models that give scores.
        weights: one for each function; 1 if not given.
        timeout: seconds for one call of an async function, which must not block its loop, and of a synchronous one if
            it runs in the worker process. None: no limit.
        worker_process: run the synchronous functions in one other process. They are loaded there by their spec, or
            sent by pickle, and their state lives there. Reward models stay in this one.
    Raises: InputError for a function that is not found, a wrong number of weights, one that pickle refuses, or a
        timeout that no function would keep.
    """

    def __init__(
        self,
        functions: Sequence[str | Callable[..., Any]],
        weights: Sequence[float] | None = None,
        *,
        timeout: float | None = None,
        worker_process: bool = False,
    ):
        if not functions:
            raise InputError("no reward function given; name at least one, for example last_number")
        if timeout is not None and not timeout > 0:
            raise InputError(f"timeout of the reward functions is {timeout}, expected more than 0 seconds")
        sources = [_source(function) for function in functions]
        self._functions = [load(source) for source in sources]
        self.names = _distinct([s.name if isinstance(s, Spec) else callable_name(s) for s in sources])
        self.weights = _checked_weights(weights, self.names)
        self.timeout = timeout
        self._async = [is_async(function) for function in self._functions]
        self._in_worker: dict[int, Any] = {}
        if worker_process:
            stays = [alone or model_of(function) for alone, function in zip(self._async, self._functions, strict=True)]
            self._in_worker = {index: source for index, source in enumerate(sources) if not stays[index]}
        if timeout is not None and not any(self._async) and not self._in_worker:
            raise InputError(
                f"reward_timeout is {timeout:g} s, but none of the reward functions is async, and a synchronous one "
                "can be stopped in a process of its own only (reward models stay in this one): set reward_process, or "
                "leave reward_timeout out"
            )
        self._worker = Worker(self._in_worker) if self._in_worker else None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(cls, settings: RewardSettings, functions: Sequence[str | Callable[..., Any]]) -> Self:
        """These functions, called as a config says."""
        timeout, process = settings.reward_timeout, settings.reward_process
        return cls(functions, settings.reward_weights, timeout=timeout, worker_process=process)

    @property
    def models(self) -> list[Any]:
        """The models behind the functions of this process."""
        here = (function for index, function in enumerate(self._functions) if index not in self._in_worker)
        return [model for function in here if (model := model_of(function)) is not None]

    def check_columns(self, available: Iterable[str]) -> None:
        """Refuse, before anything is called, a function that needs a column which the rows lack."""
        available = sorted(available)
        for name, function in zip(self.names, self._functions, strict=True):
            for column in required_columns(function):
                if column not in available:
                    close = difflib.get_close_matches(column, available, n=1)
                    hint = f" (did you mean {close[0]!r}?)" if close else ""
                    if column in NOT_HANDED_ON:
                        hint = " (a column of that name is not handed on: rename it with columns)"
                    raise InputError(
                        f"reward function {name!r} needs the column {column!r}, which the rows lack{hint}; "
                        f"available: {', '.join(available) or 'none'}"
                    )

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None,
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Any,
    ) -> Scores:
        """Score N completions.

        Args:
            prompts, completions: [N], strings or message lists.
            completion_ids: [N] lists of token ids.
            columns: the other columns of the rows, [N] each.
            trainer_state: an object with `global_step` and `max_steps`.
        Raises: InputError, from the function's own exception, where a function fails, takes too long, or returns the
            wrong count or a value that is not a finite number. It names the function and, where it can be told, the
            row; to tell it, a function that failed is called again on single rows.
        """
        self.check_columns(columns)
        batch = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        offered = {**columns, **batch, "trainer_state": trainer_state}
        outcomes: dict[int, Result | RewardFailure] = {}
        for index in range(len(self.names)):
            if not self._async[index]:
                outcomes[index] = self._outcome(index, offered, len(completions))
                if isinstance(outcomes[index], RewardFailure):
                    break  # no use in waiting for the others
        else:
            outcomes.update(self._async_outcomes(offered, len(completions)))
        results: list[Result] = []
        for index, outcome in sorted(outcomes.items()):
            if isinstance(outcome, RewardFailure):
                raise self._named(index, outcome, offered) from outcome.__cause__
            if twice := {column for result in results for column in result.extra} & outcome.extra.keys():
                reason = f"calls log_extra({min(twice)!r}, …), and so does another: give one of them another name"
                raise InputError(f"reward function {self.names[index]!r} {reason}")
            results.append(outcome)
        return self._scores(results)

    def close(self) -> None:
        """Stop the worker process and the event loop. The set starts them again if it is called again."""
        if self._worker is not None:
            self._worker.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _outcome(self, index: int, offered: Mapping[str, Any], count: int) -> Result | RewardFailure:
        try:
            if self._worker is None or index not in self._in_worker:
                return evaluate(self._functions[index], offered, count)
            return self._worker.call(index, select(self._functions[index], offered), count, self.timeout)
        except RewardFailure as failure:
            return failure

    def _async_outcomes(self, offered: Mapping[str, Any], count: int) -> dict[int, Result | RewardFailure]:
        indices = [index for index, alone in enumerate(self._async) if alone]

        async def together() -> list[Result | RewardFailure]:
            return await asyncio.gather(*(self._awaited(index, offered, count) for index in indices))

        return dict(zip(indices, self._on_loop(together()), strict=True)) if indices else {}

    async def _all_awaited(self, index: int, rows: Iterable[Mapping[str, Any]]) -> list[Result | RewardFailure]:
        return await asyncio.gather(*(self._awaited(index, row, 1) for row in rows))

    async def _awaited(self, index: int, offered: Mapping[str, Any], count: int) -> Result | RewardFailure:
        try:
            async with asyncio.timeout(self.timeout) as limit:
                return await evaluate_async(self._functions[index], offered, count)
        except RewardFailure as failure:
            return failure
        except TimeoutError:
            assert limit.expired()  # one that the function raised itself would have come as a RewardFailure
            return RewardFailure(f"took longer than timeout={self.timeout:g} seconds; raise reward_timeout")

    def _on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        # A thread of its own: in a notebook the calling thread already runs a loop.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run_loop, args=(self._loop,), name="taurl-rewards", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # after Ctrl-C; without effect on one that is done

    def _named(self, index: int, failure: RewardFailure, offered: Mapping[str, Any]) -> InputError:
        row = failure.row if failure.row is not None else self._row_at_fault(index, failure, offered)
        message = f"reward function {self.names[index]!r} {failure.reason}"
        if row is None:
            return InputError(message)
        prompt, completion = offered["prompts"][row], offered["completions"][row]
        asked = prompt if isinstance(prompt, str) else content_of(prompt[-1])
        return InputError(
            f"{message}; row {row} of the batch of {len(offered['completions'])}, prompt "
            f"{shorten(asked, EXCERPT)!r}, completion {shorten(text_of(completion), EXCERPT)!r}"
        )

    def _row_at_fault(self, index: int, failure: RewardFailure, offered: Mapping[str, Any]) -> int | None:
        """The first row that fails in the same way when it is alone."""
        count = len(offered["completions"])
        if not failure.kind:
            return None
        if count == 1:
            return 0
        singles = (
            {n: v if n == "trainer_state" or v is None else [v[row]] for n, v in offered.items()}
            for row in range(count)
        )
        if self._async[index]:  # all at once, as in the call that failed
            outcomes: Iterable[Result | RewardFailure] = self._on_loop(self._all_awaited(index, singles))
        else:
            outcomes = (self._outcome(index, single, 1) for single in singles)
        for row, outcome in enumerate(outcomes):
            if isinstance(outcome, RewardFailure) and outcome.kind == failure.kind:
                return row
        return None

    def _scores(self, results: list[Result]) -> Scores:
        values = np.array([result.values for result in results], dtype=np.float64).T
        applies = ~np.isnan(values)
        weights = np.array(self.weights)
        weighted = np.where(applies, values, 0.0) @ weights
        counts = applies[:, weights != 0].any(axis=1)  # a function of weight 0 watches, and makes no row count
        logged: dict[str, list[float]] = {}
        for result in results:
            for name, numbers in result.metrics.items():
                logged.setdefault(name, []).extend(numbers)
        return Scores(
            values=values,
            total=np.where(counts, weighted, np.nan),
            seconds={name: result.seconds for name, result in zip(self.names, results, strict=True)},
            metrics={name: math.fsum(numbers) / len(numbers) for name, numbers in logged.items()},
            extra={column: rows for result in results for column, rows in result.extra.items()},
        )


def _distinct(names: list[str]) -> list[str]:
    """Names made distinct: the second `f` becomes `f_2`, passing over what is taken."""
    taken: list[str] = []
    for name in names:
        candidates = (name if number == 1 else f"{name}_{number}" for number in range(1, len(names) + 2))
        taken.append(next(c for c in candidates if c not in taken))
    return taken


def _source(function: str | Callable[..., Any]) -> Spec | Callable[..., Any]:
    """Where a reward function comes from, or the function; a model is made one."""
    if isinstance(function, str):
        return parse(function)
    return reward_model(function) if hasattr(function, "named_parameters") and hasattr(function, "config") else function


def _checked_weights(weights: Sequence[float] | None, names: list[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise InputError(
            f"{len(weights)} reward weights for {len(names)} functions ({', '.join(names)}): give one each"
        )
    for weight, name in zip(weights, names, strict=True):
        if not math.isfinite(weight):
            raise InputError(f"weight of reward function {name!r} is {weight}, expected a finite number")
    return [float(weight) for weight in weights]


def model_of(function: Any) -> Any:
    """The model behind a reward function that is an object with one, as its `model`; else None."""
    model = getattr(function, "model", None)
    return model if hasattr(model, "parameters") else None


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
