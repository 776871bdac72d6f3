"""What a run shows while it works: a live view in a terminal, one line a step elsewhere."""

import math
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SAMPLE_EVERY_SECONDS = 10  # long enough to read a completion before the next one replaces it
SAMPLE_LINES = 8
SAMPLE_CHARACTERS = 800
SILENCE_SECONDS = 60.0  # without a line, where no terminal shows what goes on
SPEED_SECONDS = 3600  # time left is reckoned from the last hour; rich's half minute may hold no two steps


def number(value: Any) -> str:
    """A figure in at most some six characters."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 999.5:  # which three digits would write as 1e+03
        return f"{value:,.0f}"
    return f"{value:.3g}"


def is_score(name: str) -> bool:
    """Whether a metric is the mean of a reward function on held-out rows."""
    return name.startswith("eval/rewards/") and name.endswith("/mean")


def minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """A wall time in words: 45 s, 12 min 4 s, 3 h 20 min."""
    whole = round(seconds)
    hours, spare = divmod(whole // 60, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{spare} min"] * (whole >= 60) + [f"{whole % 60} s"] * (hours == 0)
    return " ".join(parts)


def excerpt(text: str) -> str:
    """The start and the end of a text, in a few lines, with nothing in it that a terminal would obey."""
    text = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text.strip())
    if len(text) > SAMPLE_CHARACTERS:
        half = SAMPLE_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    lines = text.split("\n")
    if len(lines) > SAMPLE_LINES:
        half = SAMPLE_LINES // 2
        lines = [*lines[:half], "…", *lines[-half:]]
    return "\n".join(lines)


def plain_console(*, stderr: bool = False) -> Console:
    """One that prints what it is given: a path or a name with [brackets] in it is no markup, figures get no colours."""
    return Console(stderr=stderr, markup=False, highlight=False)


class LastingConsole(Console):
    """Standard error that may lose its reader (`2>&1 | tee log`, and Ctrl-C ends both): the run goes on, unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # what is printed there by others shall not fail either


class View:
    """Shows a run's progress, its headline figures, and now and then a sample.

    Args:
        total: steps in all.
        headline: label → metric name, in the order shown.
        console: where to; by default standard error, so that standard output stays for results.
    """

    def __init__(self, total: int, headline: Mapping[str, str], console: Console | None = None):
        self.console = console or LastingConsole(stderr=True)
        self.is_live = self.console.is_terminal and not self.console.is_dumb_terminal  # which shows no live view
        self.total, self.headline = total, headline
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=SPEED_SECONDS,
        )
        self.task = self.progress.add_task("training", total=total, start=False)
        self.activity, self.pinned = Text(""), Text("")
        self.last: Mapping[str, Any] = {}
        self.sample_shown, self.sample_title, self.sample_time = "", "", -math.inf
        self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=False)
        self.started, self.first_step = time.monotonic(), 0
        self.spoke, self.said = time.monotonic(), ""
        self.stopped = threading.Event()
        self.watch: threading.Thread | None = None

    def set_total(self, steps: int) -> None:
        """How many steps there are in all."""
        self.total = steps
        self.progress.update(self.task, total=steps)

    def start(self, done: int) -> None:
        """Begin to show, with this many steps done already."""
        self.started, self.first_step = time.monotonic(), done
        self.pinned, self.said = Text(""), ""
        self.progress.start_task(self.task)
        self.progress.update(self.task, completed=done)
        if self.is_live:
            self.live.start()
        else:
            self.stopped.clear()
            self.watch = threading.Thread(target=self._break_silence, daemon=True)
            self.watch.start()

    def stop(self) -> None:
        """Leave the last figures standing."""
        self.status("")
        self.live.stop()
        self.stopped.set()
        if self.watch:
            self.watch.join()
            self.watch = None

    def status(self, text: str) -> None:
        """What is going on within the step."""
        self.activity = Text(text, style="dim")

    def pin(self, text: str) -> None:
        """Show this below everything from now on."""
        self.pinned = Text(text, style="yellow")
        self.console.show_cursor()  # what is pinned is that the run stops, and a second signal ends it without `stop`
        if not self.is_live:
            self.note(text)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(Text(text, style="yellow"))

    def record(self, record: Mapping[str, Any]) -> None:
        """A step's metrics."""
        self.last = {**self.last, **record}
        self.progress.update(self.task, completed=record["step"])
        if record["step"] == self.first_step:  # the evaluation before the first step is none of them
            self.started = time.monotonic()
        if not self.is_live:
            self.said = ""
            self._print(Text(self._line(record)))

    def sample(self, title: str, text: str) -> None:
        """Something that was sampled; shown when the one before has had its time."""
        now = time.monotonic()
        if now - self.sample_time >= SAMPLE_EVERY_SECONDS:
            self.sample_shown, self.sample_title, self.sample_time = excerpt(text), title, now

    def _print(self, text: Text) -> None:
        self.spoke = time.monotonic()
        self.console.print(text, soft_wrap=True)

    def _break_silence(self) -> None:
        """Where no terminal shows what goes on: say it after a minute without a line, unless it was the last said."""
        while not self.stopped.wait(SILENCE_SECONDS / 4):
            activity = self.activity.plain
            if activity not in ("", self.said) and time.monotonic() - self.spoke >= SILENCE_SECONDS:
                self.said = activity
                self._print(Text(f"after step {self.progress.tasks[0].completed:,.0f}: {activity}", style="dim"))

    def _line(self, record: Mapping[str, Any]) -> str:
        step = record["step"]
        figures = "  ".join(f"{label} {number(record[key])}" for label, key in self.headline.items() if key in record)
        held_out = "  ".join(f"{key} {number(record[key])}" for key in record if is_score(key))
        parts = [f"step {step:,}/{self.total:,}", figures, held_out]
        if step > self.first_step:
            left = (time.monotonic() - self.started) / (step - self.first_step) * max(0, self.total - step)
            parts.append(f"left {minutes(left)}")
        return "  ".join(part for part in parts if part)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 3))
        shown = [(label, key) for label, key in self.headline.items() if key in self.last]
        for _ in shown:
            table.add_column(justify="right")
        table.add_row(*(Text(label, style="dim") for label, _ in shown))
        table.add_row(*(Text(number(self.last[key]), style="bold") for _, key in shown))
        parts: list[Any] = [self.progress, table]
        if self.sample_shown:
            parts.append(Panel(Text(self.sample_shown), title=Text(self.sample_title, style="dim"), title_align="left"))
        parts += [line for line in (self.activity, self.pinned) if line.plain]
        return Group(*parts)
