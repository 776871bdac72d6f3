"""Reward functions in a process of their own, so that one which hangs can be stopped."""

import math
import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import current_process, get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import FrameType, SimpleNamespace
from typing import Any

from taurl.llm.rewards.contract import Result, RewardFailure, evaluate
from taurl.llm.rewards.specs import Spec, callable_name, explain, load
from taurl.runtime.errors import InputError


class WorkerTraceback(Exception):
    """The traceback of an exception in the worker process, as text: the exception itself may not be picklable."""

    def __str__(self) -> str:
        return f"in the worker process:\n{self.args[0]}"


class Worker:
    """One process, started when first needed, stopped when a call takes too long, and then started again.

    Args:
        functions: by a number, a Spec (the process loads the function itself) or a function that pickle sends by name.
    Raises: InputError for a function that pickle refuses.
    """

    def __init__(self, functions: Mapping[int, Spec | Callable[..., Any]]):
        self._functions = {number: _pickled(function) for number, function in functions.items()}
        self._loaded: set[int] = set()
        self._process: Any = None
        self._connection: Any = None
        self._stop: Callable[[], Any] = lambda: None

    def call(self, number: int, offered: Mapping[str, Any], count: int, timeout: float | None) -> Result:
        """`evaluate` one function there. Raises RewardFailure, also where the process ended or ran out of time."""
        if self._process is None or not self._process.is_alive():
            self._start()
        if number not in self._loaded:
            self._ask(("load", number, self._functions[number]), None)  # loading is no call: it has no timeout
            self._loaded.add(number)
        if "trainer_state" in offered:  # the real one may hold a whole trainer
            state = offered["trainer_state"]
            plain_state = SimpleNamespace(global_step=state.global_step, max_steps=state.max_steps)
            offered = {**offered, "trainer_state": plain_state}
        result: Result = self._ask(("call", number, offered, count), timeout)
        return result

    def close(self) -> None:
        self._stop()
        self._process = None

    def _start(self) -> None:
        self.close()
        self._loaded.clear()
        context = get_context("spawn")  # fork is unsafe beside torch's threads
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), name="taurl-rewards", daemon=True)
        self._process.start()
        there.close()
        # Also at exit, where multiprocessing would wait for ever for a process that ignores SIGTERM.
        self._stop = weakref.finalize(self, _end, self._process, self._connection)

    def _ask(self, message: tuple[Any, ...], timeout: float | None) -> Any:
        try:
            packed = pickle.dumps(message)
        except Exception as error:
            raise RewardFailure(f"cannot be given its rows in the worker process: {explain(error)}") from error
        try:
            self._connection.send_bytes(packed)
            if not self._answered(timeout):
                raise RewardFailure(
                    f"took longer than timeout={timeout:g} seconds and was stopped; "
                    "raise reward_timeout or make it faster"
                )
            answer, text = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._ended() from error
        except BaseException:  # also Ctrl-C: the answer to this call must not be taken for that to the next
            self.close()
            raise
        if isinstance(answer, RewardFailure):
            raise answer from (WorkerTraceback(text) if text else None)
        return answer

    def _answered(self, timeout: float | None) -> bool:
        """Wait for an answer. Raises: EOFError where the process is gone, though a child may hold the pipe open."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self._connection.poll(max(0.0, min(1.0, until - time.monotonic()))):
            if not self._process.is_alive() and not self._connection.poll():
                raise EOFError
            if time.monotonic() >= until:
                return False
        return True

    def _ended(self) -> RewardFailure:
        self._process.join(5)  # the exit code can come a moment after the closed pipe
        reason = f"ended its worker process (exit code {self._process.exitcode})"
        if not self._loaded:
            reason += "; a script that starts training must do so under `if __name__ == '__main__':`"
        self.close()
        return RewardFailure(reason)


def _pickled(function: Spec | Callable[..., Any]) -> bytes:
    try:
        return pickle.dumps(function)
    except Exception as error:
        name = function.name if isinstance(function, Spec) else callable_name(function)
        raise InputError(
            f"reward function {name!r} cannot be sent to a worker process ({explain(error)}); "
            "put it at the top level of a module, or give path/to/file.py:function"
        ) from error


def _end(process: Any, connection: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # with what its functions have started
    except (ProcessLookupError, PermissionError):  # it has no group of its own yet, or is gone
        process.kill()
    process.join()
    connection.close()


def _serve(connection: Connection) -> None:
    """The life of the process: answer until the other end is closed."""
    os.setsid()  # a group that can be ended as one
    # A signal (Ctrl-C, a scheduler) lets the run finish its step, for which it needs this process; what that starts
    # shall obey it, so that it is not ignored, which programs would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_pass_over, os.getpid()))
    current_process().daemon = False  # which could start no processes
    threading.Thread(target=_die_with_parent, daemon=True).start()
    functions: dict[int, Callable[..., Any]] = {}
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(functions, message))


def _pass_over(process: int, number: int, frame: FrameType | None) -> None:
    """Obey a signal only in a process that was forked from this one."""
    if os.getpid() != process:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _answer(functions: dict[int, Callable[..., Any]], message: bytes) -> bytes:
    try:
        task, number, *rest = pickle.loads(message)
        if task == "load":
            functions[number] = _load(*rest)
            return pickle.dumps((None, ""))
        return pickle.dumps((evaluate(functions[number], *rest), ""))
    except RewardFailure as failure:
        text = "".join(traceback.format_exception(failure.__cause__)) if failure.__cause__ else ""
        return pickle.dumps((failure, text))
    except Exception as error:  # rows that cannot be unpickled here, `log_extra` values that cannot be sent
        reason = f"could not exchange values with its worker process: {explain(error)}"
        return pickle.dumps((RewardFailure(reason), traceback.format_exc()))


def _load(pickled: bytes) -> Callable[..., Any]:
    try:
        return load(pickle.loads(pickled))
    except Exception as error:
        raise RewardFailure(
            f"cannot be loaded in the worker process ({explain(error)}); put it into a file and "
            "give path/to/file.py:function"
        ) from error


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(os.getpgrp(), signal.SIGKILL)  # a reward function that hangs would outlive a killed run
