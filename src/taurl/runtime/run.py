"""The run directory and the loop around the steps: the only code that writes there."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from taurl.runtime import metrics
from taurl.runtime.checkpoints import checkpoint_steps, load_checkpoint, save_checkpoint
from taurl.runtime.config import TrainingConfig, free_on_resume, read_config
from taurl.runtime.errors import InputError, Interrupted, RunError
from taurl.runtime.machine import describe_machine
from taurl.runtime.seeding import random_states, restore_random_states
from taurl.runtime.terminal import View

Record = dict[str, Any]
Callback = Callable[[Record], None]


class Stateful(Protocol):
    """What a checkpoint can hold: named tensors out, the same back in."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...


class Run:
    """A run directory `runs/NAME/`: config, metrics, samples, checkpoints, and the steps that fill it.

    `Run.start` refuses a directory that exists; `Run.resume` reads one. Nothing is written before `begin`.
    """

    def __init__(self, directory: Path, config: TrainingConfig, *, headline: Mapping[str, str], environment: Record):
        self.directory, self.config, self.environment = directory, config, environment
        self.view = View(config.steps, headline)
        self.step = 0
        self.seconds = 0.0  # wall time of earlier parts of this run
        self.chosen: Record = {}  # what was chosen on the machine where the run began: precision, threads, …
        self.checkpoint: tuple[dict[str, dict[str, Tensor]], Record] | None = None
        self.state: dict[str, Stateful] = {}
        self.callbacks: Sequence[Callback] = ()
        self.interrupted: int | None = None
        self.resumed = False
        self._started = time.monotonic()
        self._board: metrics.TensorBoard | None = None

    @classmethod
    def start(cls, config: TrainingConfig, *, algorithm: str, headline: Mapping[str, str]) -> Self:
        """A new run; InputError when its directory exists and is not empty."""
        directory = config.out or Path("runs") / f"{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            hint = "resume it" if (directory / "config.yaml").exists() else "it is not empty"
            raise InputError(f"{directory} exists already ({hint}, or give another directory with out)")
        config = config.model_copy(update={"out": directory})
        return cls(directory, config, headline=headline, environment={"algorithm": algorithm})

    @classmethod
    def resume(cls, directory: Path, config: TrainingConfig, *, headline: Mapping[str, str]) -> Self:
        """A run that goes on from its newest whole checkpoint (from the start if it has none).

        Args:
            config: the settings to go on with; differences from the run's own must be free to change.
        Raises: InputError naming the first setting that would alter what was already computed.
        """
        stored = read_config(directory, type(config))
        for name in config.changed_from(stored):
            if not free_on_resume(type(config), name):
                raise InputError(
                    f"{directory}: {name} was {getattr(stored, name)!r} and cannot become {getattr(config, name)!r} "
                    "on resume: it would alter steps already taken; start a new run for that"
                )
        if config.steps != stored.steps and config.schedule != "constant":
            raise InputError(
                f"{directory}: steps was {stored.steps} and cannot become {config.steps}: the {config.schedule} "
                "schedule falls to 0 at the last step, so steps already taken would have had another learning rate"
            )
        run = cls(directory, config, headline=headline, environment=read_environment(directory))
        run.resumed = True
        run._find_checkpoint()
        return run

    def _find_checkpoint(self) -> None:
        checkpoints = self.directory / "checkpoints"
        for step in reversed(checkpoint_steps(checkpoints)):
            try:
                self.checkpoint = load_checkpoint(checkpoints, step)
            except RunError as error:
                self.view.note(f"{error}; using the checkpoint before")
                continue
            values = self.checkpoint[1]
            self.step, self.seconds, self.chosen = step, values["seconds"], values["chosen"]
            return

    def begin(self, **state: Stateful) -> None:
        """Create or reopen the directory, and put the state back that the checkpoint holds."""
        self.state = state
        if self.checkpoint is not None:
            tensors, values = self.checkpoint
            for name, holder in state.items():
                holder.load_tensors(tensors[name])
            restore_random_states(values["random"])
            self.checkpoint = None  # a gigabyte that is not needed again
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            metrics.cut_after(self.directory / name, self.step if self.step else -1)
        write_whole(self.directory / "config.yaml", self.config.to_yaml())
        self._write_environment()
        purge = self.step if self.resumed else None
        self._board = metrics.TensorBoard(self.directory / "tensorboard", purge_after=purge)

    def _write_environment(self) -> None:
        packages = {name: version(name) for name in ("taurl", "torch", "transformers", "numpy")}
        facts = {
            **self.environment,
            **packages,
            **describe_machine(),
            **self.chosen,
            "threads": torch.get_num_threads(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        facts.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self.environment = facts
        write_whole(self.directory / "environment.json", json.dumps(facts, indent=1, ensure_ascii=False))

    def steps(self) -> "Iterator[Step]":
        """The steps still to do. SIGINT and SIGTERM let the step finish, save, and raise Interrupted."""
        self._started = time.monotonic()
        self.view.start(self.step)
        try:
            with self._signals():
                while self.step < self.config.steps:
                    self._stop_if_interrupted()
                    yield Step(self, self.step + 1)
                self._stop_if_interrupted()
        finally:
            self.view.stop()
            if self._board:
                self._board.close()

    def log(self, record: Record) -> None:
        """Write one record (it has a `step`) to all places, and hand it to the callbacks."""
        record = {"step": record["step"], "seconds": round(self.elapsed(), 3), **record}
        metrics.append_lines(self.directory / "metrics.jsonl", [record])
        if self._board:
            self._board.write(record)
        self.view.record(record)
        for callback in self.callbacks:
            callback(record)

    def log_samples(self, samples: Sequence[Record]) -> None:
        """Append samples, each with its `step`, to samples.jsonl."""
        metrics.append_lines(self.directory / "samples.jsonl", samples)

    def elapsed(self) -> float:
        """Wall time spent in this run's steps, over all its parts, in seconds."""
        return self.seconds + time.monotonic() - self._started

    def save(self) -> Path:
        """Write a checkpoint of the state as it stands after `self.step` steps."""
        self.view.status("saving a checkpoint")
        values = {"seconds": self.elapsed(), "chosen": self.chosen, "random": random_states()}
        tensors = {name: holder.tensors() for name, holder in self.state.items()}
        checkpoints = self.directory / "checkpoints"
        return save_checkpoint(checkpoints, self.step, tensors, values, keep=self.config.keep_checkpoints)

    def records(self) -> list[Record]:
        """The metrics written so far."""
        return metrics.read_lines(self.directory / "metrics.jsonl")

    def samples(self) -> list[Record]:
        """The samples written so far."""
        return metrics.read_lines(self.directory / "samples.jsonl")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of dying; a second one is obeyed at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in numbers]

        def note(number: int, frame: FrameType | None) -> None:
            self.interrupted = number
            self.view.status(f"{signal.Signals(number).name}: finishing the step, then saving; again to stop at once")
            for each, handler in zip(numbers, before, strict=True):
                signal.signal(each, handler)

        for number in numbers:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _stop_if_interrupted(self) -> None:
        if self.interrupted is not None:
            name = signal.Signals(self.interrupted).name
            raise Interrupted(
                f"{name}: stopped after step {self.step} of {self.config.steps}; go on with --resume {self.directory}",
                self.interrupted,
            )


class Step:
    """One step under way: times its phases, and is finished with its metrics."""

    def __init__(self, run: Run, number: int):
        self.run, self.number = run, number
        self.times: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str, status: str) -> Iterator[None]:
        """Time a phase as `time/NAME` and show what goes on."""
        self.run.view.status(status)
        start = time.perf_counter()
        yield
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0.0) + time.perf_counter() - start

    def finish(self, **figures: Any) -> Record:
        """Log the step's metrics, and save a checkpoint if one is due. Returns the record."""
        run = self.run
        record = {"step": self.number, **figures, **self.times, "time/step": time.perf_counter() - self._started}
        run.step = self.number
        run.log(record)
        every = run.config.save_every
        if run.step == run.config.steps or run.interrupted or (every and run.step % every == 0):
            run.save()
        return record


def read_environment(directory: Path) -> Record:
    """The facts noted when the run began; empty if they are missing."""
    path = directory / "environment.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return dict(found)


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that no reader meets half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
