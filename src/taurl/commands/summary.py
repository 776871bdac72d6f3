"""The table at the end of a training run: held-out scores and answers, before and after."""

from typing import Any

from rich.table import Table
from rich.text import Text

from taurl.runtime.run import Run
from taurl.runtime.terminal import duration, excerpt, is_score, plain_console

ANSWERS = 3


def show_summary(run: Run) -> None:
    """Print before and after, wall time, and where everything is."""
    console = plain_console()
    evaluations = [record for record in run.records() if any(key.startswith("eval/") for key in record)]
    if evaluations:
        console.print(scores(evaluations[0], evaluations[-1]))
        if samples := [sample for sample in run.samples() if sample["kind"] == "evaluation"]:
            console.print(answers(samples, evaluations[0]["step"], evaluations[-1]["step"]))
    show_places(run, "model")


def show_places(run: Run, what: str) -> None:
    """Print how long it took, and where the run, what it has trained, and the report are."""
    places = {"run directory": "", what: "final", "report": "report.html"}
    lines = [f"{run.step:,} steps in {duration(run.elapsed())}"]
    lines += [f"{name:<15}{run.directory / place}" for name, place in places.items()]
    for line in lines:
        plain_console().print(line, soft_wrap=True)


def scores(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Held-out figures: losses and shares, a row for each reward function, their sum if there are several, lengths."""
    table = Table(title="held-out rows", title_justify="left")
    for heading in ("", f"before (step {before['step']})", f"after (step {after['step']})"):
        table.add_column(heading, justify="right" if heading else "left")
    functions = [key for key in before if is_score(key)]
    told = {"eval/reward"} if len(functions) < 2 else set()
    for key in before:
        if key.startswith("eval/") and key not in told and not key.endswith(("/std", "/seconds")):
            name = key.removeprefix("eval/").removeprefix("rewards/").removesuffix("/mean")
            table.add_row(name, *(number(record.get(key)) for record in (before, after)))
    return table


def answers(samples: list[dict[str, Any]], before: int, after: int) -> Table:
    """The first held-out rows whose answer changed, or the first ones."""
    by_step: dict[int, dict[int, dict[str, Any]]] = {before: {}, after: {}}
    for sample in samples:
        if sample["step"] in by_step:
            by_step[sample["step"]][sample["row"]] = sample
    first, last = by_step[before], by_step[after]
    rows = sorted(
        first.keys() & last.keys(), key=lambda row: (first[row]["completion"] == last[row]["completion"], row)
    )
    table = Table(title="answers", title_justify="left", show_lines=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, overflow="fold")
    for row in rows[:ANSWERS]:
        cells = (excerpt(first[row]["prompt"]), marked(first[row]), marked(last[row]))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def marked(sample: dict[str, Any]) -> str:
    """An answer with its reward."""
    return f"{excerpt(sample['completion'])}\n(reward {number(sample['reward'])})"


def number(value: float | None) -> str:
    """A figure, or a dash where no reward applied."""
    return "–" if value is None else f"{value:.3f}"
