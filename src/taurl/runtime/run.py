"""The run directory and the loop around the steps: the only code that writes there."""

import atexit
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from taurl.runtime import metrics
from taurl.runtime.checkpoints import (
    checkpoint_steps,
    discard_leftovers,
    last_good,
    load_checkpoint,
    save_checkpoint,
)
from taurl.runtime.config import RunConfig, read_config
from taurl.runtime.directory import (
    claim,
    describe_environment,
    read_environment,
    refuse_other_past,
    refuse_taken,
    unused,
    write_folder,
)
from taurl.runtime.errors import InputError, Interrupted, RunError, one_line
from taurl.runtime.files import write_whole, writing
from taurl.runtime.seeding import random_states, restore_random_states
from taurl.runtime.signals import StopSignals
from taurl.runtime.step import Step
from taurl.runtime.terminal import View

GIVEN = "given_from_python"  # in environment.json: the names of what came as objects
ENDED = "ended"  # there too: the interruption or failure that ended the run early
STOPPED = "stopped"  # and why it needs no more steps, where it stopped before the last

Record = dict[str, Any]
Callback = Callable[[Record], None]


class Stateful(Protocol):
    """What a checkpoint can hold: named tensors out, the same back in; `changes` counts up when they change."""

    changes: int

    def tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...


class Run:
    """A run directory `runs/NAME/`: config, metrics, samples, checkpoints, and the steps that fill it.

    `Run.start` refuses a directory that exists; `Run.resume` reads one. Nothing is written before `begin`:

        with run.begin(optimizer=optimizer):
            for step in run.steps():
                ...
                step.finish(loss=loss)

    Leaving the block gives terminal and signals back. If an error ends it, the steps that were finished are saved
    first, unless the step that failed has changed the state already.
    """

    def __init__(self, directory: Path, config: RunConfig, *, headline: Mapping[str, str], environment: Record):
        self.directory, self.config, self.environment = directory, config, environment
        self.view = View(config.steps, headline)
        self.step = 0
        self.seconds = 0.0  # wall time of earlier parts of this run
        self.chosen: Record = {}  # what was chosen on the machine where the run began: precision, threads, …
        self.checkpoint: tuple[dict[str, dict[str, Tensor]], Record] | None = None
        self.state: dict[str, Stateful] = {}
        self._random: Record | None = None  # random states to begin with
        self.callbacks: Sequence[Callback] = ()
        self._owned = False  # whether what is in the directory is this run's
        self._unnamed = False  # whether nobody has named the directory, so that it is to be told
        self._saved = 0  # the newest step that has, or was refused, a checkpoint
        self._whole: tuple[Record, int] = {}, 0  # random states, and count of changes, where self.step ended
        self._started: float | None = None
        self._board: metrics.TensorBoard | None = None
        self._open = False
        self.stop_signals = StopSignals(
            lambda name: self.view.pin(f"{name}: finishing the step, then saving; again to stop at once")
        )

    @classmethod
    def start(cls, config: RunConfig, *, algorithm: str, headline: Mapping[str, str]) -> Self:
        """A new run; InputError when its directory exists and is not empty."""
        directory = config.out or unused(Path("runs") / f"{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
        refuse_taken(directory)
        unnamed, config = config.out is None, config.model_copy(update={"out": directory})
        run = cls(directory, config, headline=headline, environment={"algorithm": algorithm})
        run._unnamed = unnamed
        return run

    @classmethod
    def resume(cls, directory: Path, config: RunConfig, *, headline: Mapping[str, str]) -> Self:
        """A run that goes on from its newest whole checkpoint (from the start if it has none).

        Args:
            config: the settings to go on with; differences from the run's own must be free to change.
        Raises: InputError naming the first setting that would alter what was already computed; RunError when there
            are checkpoints, none of them whole.
        """
        stored = read_config(directory, type(config))
        refuse_other_past(directory, stored, config)
        config = config.model_copy(update={"out": directory})
        run = cls(directory, config, headline=headline, environment=read_environment(directory))
        run._owned = True
        run._find_checkpoint()
        if run.step > config.steps and config.steps < stored.steps:  # the last of wider steps may end past them
            raise InputError(f"{directory}: steps is {config.steps}, but {run.step} are taken already")
        if run.step >= config.steps:
            advice = "" if config.spread_over_steps else "; raise steps to go on"
            run.view.note(f"{directory}: all {run.step} steps are taken already, its result is written again{advice}")
        return run

    def _find_checkpoint(self) -> None:
        """Take the newest whole checkpoint; each one that is damaged is said."""
        checkpoints = self.directory / "checkpoints"
        damaged: list[RunError] = []
        for step in reversed(checkpoint_steps(checkpoints)):
            try:
                self.checkpoint = load_checkpoint(checkpoints, step)
            except RunError as error:
                damaged.append(error)
                continue
            for problem in damaged:
                self.view.note(f"{problem}; going on from the checkpoint before, step {step}")
            values = self.checkpoint[1]
            self.step = self._saved = step
            self.seconds, self.chosen = values["seconds"], values["chosen"]
            return
        if damaged:  # to begin again would cut away the metrics and samples there are: not without being asked
            raise RunError(f"{damaged[0]}; no whole checkpoint is left: remove {checkpoints} to begin again")
        if self.records():
            self.view.note(f"{self.directory}: no checkpoint was written yet, so the run begins again")

    def set_steps(self, steps: int) -> None:
        """The number of steps, where it is known only once the data has been read."""
        self.config = self.config.model_copy(update={"steps": steps})
        self.view.set_total(steps)

    def restore(self, **state: Stateful) -> None:
        """Put the state back that the checkpoint of a resumed run holds, if that was not done yet.

        A new run draws its random numbers from where they are now, whatever is drawn or seeded until it begins.
        """
        self.state = state
        if self.checkpoint is not None:
            tensors, values = self.checkpoint
            for name, holder in state.items():
                holder.load_tensors(tensors[name])
            self._random = values["random"]
            self.checkpoint = None  # a gigabyte that is not needed again
        elif self._random is None:
            self._random = random_states()

    def begin(self, **state: Stateful) -> Self:
        """Create or reopen the directory, with the state and the random numbers that the checkpoint holds."""
        self.restore(**state)
        if self._random:
            restore_random_states(self._random)
            self._random = {}
        self._open_directory()
        self.mark()
        self._started = self._started or time.monotonic()
        return self

    def _open_directory(self) -> None:
        if not self._owned:
            self.directory = claim(self.directory, unnamed=self._unnamed)
            self.config = self.config.model_copy(update={"out": self.directory})
        discard_leftovers(self.directory / "checkpoints", after=self.step)
        last = self.step or -1  # without a checkpoint everything is done again, the evaluation of step 0 too
        for name in ("metrics.jsonl", "samples.jsonl"):
            metrics.cut_after(self.directory / name, last)
        for early in (ENDED, STOPPED):
            self.environment.pop(early, None)
        self.environment = describe_environment({**self.environment, **self.chosen})
        self._write_environment()
        # Last of those that resuming needs, since it is what makes the directory a run's.
        write_whole(self.directory / "config.yaml", self.config.to_yaml().encode())
        if self._unnamed:
            self.view.note(f"run directory: {self.directory}")
            self._unnamed = False
        purge_from = last + 1 if self._owned else None
        self._board = metrics.TensorBoard(self.directory / "tensorboard", purge_from=purge_from)
        self._owned = True

    def _write_environment(self) -> None:
        facts = json.dumps(self.environment, indent=1, ensure_ascii=False)
        write_whole(self.directory / "environment.json", facts.encode(errors="backslashreplace"))

    def __enter__(self) -> Self:
        if not self._open:
            self._open = True
            atexit.register(self.close)  # a loop over `steps` that was left: its generator is closed after all modules
            self.view.start(self.step)
            self.stop_signals.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, Interrupted):  # which has saved, and says how
                self._rescue()
            if error is not None and not isinstance(error, GeneratorExit):  # a loop over `steps` may be left
                own = isinstance(error, InputError | RunError | Interrupted)  # whose words are for a person
                self.environment[ENDED] = one_line(error if own else f"{type(error).__name__}: {error}")
                with suppress(RunError):  # what ended the run is what to tell
                    self._write_environment()
        finally:
            self.close()

    def close(self) -> None:
        """Give terminal and signals back, and close the files."""
        self.stop_signals.restore()
        if self._open:
            self._open = False
            atexit.unregister(self.close)
            self.view.stop()
        if self._board:
            with suppress(RunError):  # every record was flushed as it was written
                self._board.close()
            self._board = None

    def _rescue(self) -> None:
        """After a failure: save the finished steps that no checkpoint has, if the state is still theirs."""
        random, changes = self._whole
        if self.step == self._saved:
            if self.step in checkpoint_steps(self.directory / "checkpoints"):  # and was not refused one
                self.view.note(f"the steps up to {self.step} are saved; go on with {self._way_on()}")
            return
        if self._changes() != changes:
            self.view.note(
                f"the steps up to {self.step} are not saved: the one that failed had changed the state already; "
                f"{last_good(self.directory / 'checkpoints')}"
            )
            return
        try:
            self.save(random)
            self.view.note(f"the steps up to {self.step} are saved; go on with {self._way_on()}")
        except RunError as error:  # says itself which checkpoint is the last good one
            self.view.note(str(error))
        except Exception as error:  # of memory, for example; what failed before is what to raise
            self.view.note(f"the steps up to {self.step} are not saved: {one_line(error)}")

    def _way_on(self) -> str:
        """How the run is resumed: on the command line, or from Python where it was given objects."""
        if objects := self.environment.get(GIVEN):
            again = "".join(f", {name}=…" for name in objects)
            return f"resume({str(self.directory)!r}{again}) from Python"
        return f"--resume {self.directory}"

    def _changes(self) -> int:
        return sum(holder.changes for holder in self.state.values())

    def mark(self) -> None:
        """Note that the state is the one after `self.step` steps."""
        self._whole = random_states(), self._changes()

    def steps(self, width: int = 1, unit: int = 1) -> Iterator[Step]:
        """The steps still to do. SIGINT and SIGTERM let the step finish, save, and raise Interrupted.

        Args:
            width: what one counts: 1 for optimisation steps; where `config.steps` are environment steps, as many as
                are taken before the next record.
            unit: environment steps of an iteration; the last step ends with the first one at or past `config.steps`.
        """
        self.__enter__()
        try:
            while self.step < self.config.steps and STOPPED not in self.environment:
                self._stop_if_interrupted()
                self.mark()
                left = -(-(self.config.steps - self.step) // unit) * unit
                yield Step(self, self.step + min(width, left))
            self._stop_if_interrupted()
        finally:
            self.close()

    def log(self, record: Record) -> None:
        """Write one record (it has a `step`) to all places, and hand it to the callbacks."""
        record = {"step": record["step"], "seconds": round(self.elapsed(), 3), **record}
        with self._recording():
            metrics.append_lines(self.directory / "metrics.jsonl", [record])
            if self._board:
                self._board.write(record)
        self.view.record(record)
        for callback in self.callbacks:
            callback(record)

    def log_samples(self, samples: Sequence[Record]) -> None:
        """Append samples, each with its `step`, to samples.jsonl."""
        with self._recording():
            metrics.append_lines(self.directory / "samples.jsonl", samples)

    def write_artifact(self, name: str, content: bytes) -> None:
        """Write a file under artifacts/, at once and whole, in place of the one before. The report shows pictures."""
        with self._recording():
            path = self.directory / "artifacts" / name
            with writing(path):
                path.parent.mkdir(exist_ok=True)
            write_whole(path, content)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except RunError as error:
            raise RunError(f"{error}; {last_good(self.directory / 'checkpoints')}; free space, then resume") from error

    def elapsed(self) -> float:
        """Wall time since `begin`, over all parts of this run, in seconds."""
        return self.seconds + (time.monotonic() - self._started if self._started else 0.0)

    def save(self, random: Record | None = None) -> Path:
        """Write a checkpoint of the state after `self.step` steps, with these random states or the present ones.

        Raises: RunError when it cannot be written; the checkpoints before stay.
        """
        self._saved = self.step
        self.view.status("saving a checkpoint")
        values = {"seconds": self.elapsed(), "chosen": self.chosen, "random": random or random_states()}
        tensors = {name: holder.tensors() for name, holder in self.state.items()}
        checkpoints = self.directory / "checkpoints"
        return save_checkpoint(checkpoints, self.step, tensors, values, keep=self.config.keep_checkpoints)

    @contextmanager
    def leaving(self, export: Callable[[Path], None], early: Callable[[Path], None] | None = None) -> Iterator[None]:
        """Around all steps: write their result to `final/`, also where they are interrupted or fail after the first.

        A second signal ends the run at once, and leaves nothing more.

        Args:
            export: writes the result into a folder.
            early: the same, of what the steps have made so far, where `export` takes long.
        Raises: RunError when the result of all steps cannot be written.
        """
        before = self.step
        try:
            yield
        except Exception:
            final = self.directory / "final"
            if self.step > before or (self.step and not final.exists()):
                try:
                    write_folder(final, early or export)
                    more = "" if self._changes() == self._whole[1] else ", and a part of the next,"
                    self.view.note(f"what {self.step:,} steps{more} have made is in {final}")
                except Exception as error:  # what ended the run is what to raise
                    self.view.note(f"{final} was not written: {one_line(error)}")
            raise
        write_folder(self.directory / "final", export)  # of the directory that the run has had since it began

    def stop(self, why: str) -> None:
        """Save the run as it stands, and take no more steps."""
        self.save()
        self.view.note(f"stopped at step {self.step:,}: {why}")
        self.environment[STOPPED] = why
        self._write_environment()

    def records(self) -> list[Record]:
        """The metrics written so far."""
        return metrics.read_lines(self.directory / "metrics.jsonl")

    def samples(self) -> list[Record]:
        """The samples written so far."""
        return metrics.read_lines(self.directory / "samples.jsonl")

    def _stop_if_interrupted(self) -> None:
        number = self.stop_signals.received
        if number is None:
            return
        if self.step > self._saved:  # the signal came after the step had been finished
            self.save()
        raise Interrupted(
            f"{Signals(number).name}: stopped after step {self.step} of {self.config.steps}; "
            f"go on with {self._way_on()}",
            number,
        )
