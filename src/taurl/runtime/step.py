"""One step of a run: what its phases took, and what is written when it ends."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from taurl.runtime.machine import give_back_free_memory

if TYPE_CHECKING:
    from taurl.runtime.run import Record, Run

SHORT = 1.0  # seconds: a shorter step is not worth what the next one needs to fault its memory in again


class Step:
    """One step under way: times its phases, and is finished with its metrics."""

    def __init__(self, run: "Run", number: int):
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

    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._started

    def finish(self, **figures: Any) -> "Record":
        """Log the step's metrics, and save a checkpoint if one is due. Returns the record."""
        run = self.run
        record = {"step": self.number, **figures, **self.times, "time/step": self.elapsed()}
        before, run.step = run.step, self.number
        run.mark()
        run.log(record)
        if self.elapsed() > SHORT:
            give_back_free_memory()
        every = run.config.save_every
        due = every and run.step // every > before // every
        if run.step >= run.config.steps or run.stop_signals.received or due:
            run.save()
        return record
