"""`taurl llm score`: the completions of a file with a reward model's scores."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from taurl.commands.options import parse
from taurl.llm.inference_config import ScoreConfig
from taurl.runtime.errors import InputError
from taurl.runtime.files import require_new
from taurl.runtime.terminal import plain_console

ROWS_AT_ONCE = 256  # between two writes
FORMS = (("completion",), ("chosen", "rejected"), ("completions",))


def main(words: Sequence[str]) -> int:
    config = parse(ScoreConfig, words, prog="taurl llm score")
    if config.model is None or config.dataset is None:
        missing = "model" if config.model is None else "dataset"
        raise InputError(f"no {missing} given: taurl llm score --model runs/NAME/final --dataset FILE")
    require_new(config.out)

    from taurl.llm.data.datasets import load_rows
    from taurl.llm.data.preference_rows import check_implicit_prompt
    from taurl.llm.data.tasks import named
    from taurl.runtime.machine import keep_freed_memory, out_of_memory_names, set_threads
    from taurl.runtime.metrics import append_lines, print_lines

    with named(config.dataset):
        given = load_rows(config.dataset, columns=config.columns)
        rows, columns = readable(given)
        if config.best and columns != ("completion",):
            raise InputError("best chooses between rows of one completion each; these rows hold several")

    from taurl.llm.rewards import reward_model

    keep_freed_memory()
    set_threads(config.threads)
    reward = reward_model(
        config.model,
        normalize=config.normalize,
        tokens_per_part=config.tokens_per_part,
        device=config.device,
        precision=config.precision,
        prompt_format=config.prompt_format,
        system_prompt=config.system_prompt,
    )
    if columns == ("chosen", "rejected"):
        with named(config.dataset):
            for number, row in enumerate(given, start=1):
                check_implicit_prompt(row, number, reward.conversations)
    put: Callable[[list[dict[str, Any]]], None]
    put = print_lines if config.out is None else partial(append_lines, config.out)
    scored: list[dict[str, Any]] = []
    with out_of_memory_names("tokens_per_part"):
        for batch in scored_batches(reward, rows, columns):
            scored += batch
            if not config.best:
                put(batch)
    written = best_of_each(scored) if config.best else scored
    if config.best:
        put(written)
    show(scored, written, columns)
    if config.out is not None:
        print(f"scores: {config.out}", file=sys.stderr)
    return 0


def readable(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Rows with prompts, and the columns that hold their completions. Raises: InputError by row and column."""
    from taurl.llm.data.chat import prompt_problem, says_nothing
    from taurl.llm.data.datasets import check_prompts, columns_of
    from taurl.llm.data.preference_rows import with_prompt

    available = columns_of(rows)
    columns = next((form for form in FORMS if set(form) <= set(available)), None)
    if columns is None:
        raise InputError(
            f"no completions; the data has {', '.join(available)}; expected completion, or chosen and rejected, or "
            "completions: rename one with --columns"
        )
    for name in score_names(columns):
        if name in available:
            raise InputError(f"the data has a column {name} already: keep it as --columns {name}=another_name")
    if columns == ("chosen", "rejected"):
        rows = [with_prompt(row, number) for number, row in enumerate(rows, start=1)]
    check_prompts(rows)
    for number, row in enumerate(rows, start=1):
        if columns == ("completions",) and not isinstance(row["completions"], list):
            raise InputError(f"row {number} of the data: its completions is no list")
        for completion in completions_of(row, columns):
            if not says_nothing(completion) and (problem := prompt_problem(completion, "a completion")):
                raise InputError(f"row {number} of the data: {problem}")
    return rows, columns


def completions_of(row: dict[str, Any], columns: tuple[str, ...]) -> list[Any]:
    """The completions of a row, in order."""
    return list(row["completions"]) if columns == ("completions",) else [row[name] for name in columns]


def score_names(columns: tuple[str, ...]) -> list[str]:
    """The columns that the scores of these go to."""
    if columns == ("completions",):
        return ["scores"]
    return ["score"] if len(columns) == 1 else [f"score_{name}" for name in columns]


def scored_batches(reward: Any, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    """Rows with `score`, `score_chosen` and `score_rejected`, or `scores`, as they are done."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        given = [completions_of(row, columns) for row in batch]
        data = [row for row, completions in zip(batch, given, strict=True) for _ in completions]
        prompts = [row["prompt"] for row in data]
        places = [
            f"row {start + number} of the data: its {columns[min(place, len(columns) - 1)]}"
            for number, completions in enumerate(given, start=1)
            for place in range(len(completions))
        ]
        scores = iter(reward.scores(prompts, [one for completions in given for one in completions], places, data))
        found = [[next(scores) for _ in completions] for completions in given]
        if columns == ("completions",):  # one column holds the scores of them all
            found = [[scores_of_row] for scores_of_row in found]
        names = score_names(columns)
        yield [row | dict(zip(names, values, strict=True)) for row, values in zip(batch, found, strict=True)]


def best_of_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of each prompt the one with the highest score, in the order of the prompts."""
    from taurl.llm.data.chat import prompt_text

    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        held = best.setdefault(prompt_text(row["prompt"]), row)
        if row["score"] is not None and (held["score"] is None or row["score"] > held["score"]):
            best[prompt_text(row["prompt"])] = row
    return list(best.values())


def show(scored: list[dict[str, Any]], written: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """What the scores look like together, on standard error."""
    import numpy as np

    from taurl.llm.pictures.reward_figures import wilson_interval

    groups: dict[str, list[float | None]]
    if columns == ("completions",):
        groups = {"scores": [value for row in scored for value in row["scores"]]}
    else:
        groups = {name: [row[name] for row in scored] for name in score_names(columns)}
    if len(written) < len(scored):
        groups["best"] = [row["score"] for row in written]
    table = Table(title=f"{len(scored)} rows", title_justify="left")
    for heading in ("", "mean", "deviation", "lowest", "highest"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in groups.items():
        known = np.array([value for value in values if value is not None] or [np.nan])
        table.add_row(name, *(f"{value:.4g}" for value in (known.mean(), known.std(), known.min(), known.max())))
    console = plain_console(stderr=True)
    console.print(table)
    if columns == ("chosen", "rejected"):
        better = np.array([[row["score_chosen"], row["score_rejected"]] for row in scored], dtype=np.float64)
        better = better[~np.isnan(better).any(1)]  # a process model may find no step
        if not len(better):
            return
        right = float(((better[:, 0] > better[:, 1]) + 0.5 * (better[:, 0] == better[:, 1])).sum())
        low, high = wilson_interval(right, len(better))
        console.print(f"accuracy {right / len(better):.3f} (95% interval {low:.3f} to {high:.3f})")
