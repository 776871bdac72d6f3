"""Rows to train and evaluate on: where they come from, what they hold, how they are split, in which order they are
taken.

Rows are a plain list of dicts, one per example, with the column names of Hugging Face TRL (`prompt` for GRPO).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from taurl.llm.data.chat import prompt_problem
from taurl.llm.data.data_files import READERS, Row, iterate_file, read_file, without_filled_keys
from taurl.llm.data.reasoning_tasks import PREFIX, reasoning_rows
from taurl.llm.data.row_forms import question
from taurl.llm.models.hub import hub_cache_only, hub_problem
from taurl.runtime.errors import InputError, one_line

Rows = list[Row]
JUDGED = ("completion", "completions", "chosen", "rejected")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def load_rows(
    name: str,
    *,
    arguments: Mapping[str, str | int | float | bool] | None = None,
    columns: Mapping[str, str] | None = None,
    answer_after: str | None = None,
    further: bool = False,
) -> Rows:
    """Read a data set by name.

    Args:
        name: `reasoning-gym:TASK`; a .jsonl, .json, .csv or .parquet file; or a hub name, as `owner/name`,
            `owner/name:split` or `owner/name:config:split` (split: train unless given).
        arguments: of the reasoning-gym task, with `size` and `seed`.
        columns: old name to new name.
        answer_after: keep of the column `answer` what follows this marker (`####` in GSM8K), without commas between
            thousands.
        further: see `prepare_rows`.
    Raises: InputError (one line) for anything that cannot be read or found.
    """
    if is_task(name):
        rows = reasoning_rows(name.removeprefix(PREFIX), arguments or {})
    else:
        _refuse_arguments(name, arguments)
        rows = read_file(name) if _is_file(name) else as_rows(hub_rows(name))
    return prepare_rows(rows, columns=columns, answer_after=answer_after, further=further)


@dataclass(frozen=True)
class Reading:
    """How the rows of a data set are read: see `load_rows`."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    answer_after: str | None = None
    further: bool = False

    @classmethod
    def of(cls, settings: Any) -> Self:
        """As the settings of a config say."""
        return cls(settings.dataset_args, settings.columns, settings.answer_after)

    def rows(self, source: object) -> Rows:
        """The rows of a data set given by name or as an object."""
        how: dict[str, Any] = {"columns": self.columns, "answer_after": self.answer_after, "further": self.further}
        if isinstance(source, str):
            return load_rows(source, arguments=self.arguments, **how)
        return prepare_rows(source, **how)

    def of_other(self, source: object) -> Self:
        """How a further data set is read: the arguments are those of a task, and go to no file."""
        arguments = self.arguments if not isinstance(source, str) or is_task(source) else {}
        return replace(self, arguments=arguments, further=True)


def iterate_rows(source: object, *, arguments: Mapping[str, Any] | None = None, start: int = 0) -> Iterator[Row]:
    """The raw rows of a data set from row `start` on (counted from 0), without holding them all where it can be.

    Files are read as rows are taken, hub data sets and iterable ones of `datasets` as streams; the rest is read whole.

    Args:
        source: a name as in `load_rows`, a `datasets.IterableDataset`, or what `as_rows` takes.
    """
    if isinstance(source, str) and is_task(source):
        source = reasoning_rows(source.removeprefix(PREFIX), arguments or {})
    elif isinstance(source, str):
        _refuse_arguments(source, arguments)
        if _is_file(source):
            return islice(iterate_file(source), start, None)
        source = hub_rows(source, streaming=True)
    if hasattr(source, "skip"):  # a data set of `datasets`
        return (without_filled_keys(dict(row)) for row in source.skip(start))
    return islice(as_rows(source), start, None)


def is_task(name: str) -> bool:
    """Whether a data set's name is that of a reasoning-gym task."""
    return name.startswith(PREFIX)


def _refuse_arguments(name: str, arguments: Mapping[str, Any] | None) -> None:
    if arguments:
        raise InputError(f"data set '{name}' takes no arguments ({', '.join(arguments)} given); only {PREFIX}TASK does")


def _is_file(name: str) -> bool:
    return name.startswith(("/", "~", ".")) or name.endswith(tuple(READERS)) or Path(name).exists()


def prepare_rows(
    rows: object,
    *,
    columns: Mapping[str, str] | None = None,
    answer_after: str | None = None,
    first: int = 1,
    further: bool = False,
) -> Rows:
    """Rows given from Python, or just read, with their columns renamed and the answer cut out as `load_rows` says.

    A `question` is the prompt of rows that have none.

    Args:
        first: number of the first row, for error messages.
        further: whether they are of a data set beside the one that the settings describe, of which only what is there
            is renamed and cut.
    """
    plain, columns = as_rows(rows), columns or {}
    if further:
        there = columns_of(plain)
        columns = {old: new for old, new in columns.items() if old in there}
        answer_after = answer_after if "answer" in [columns.get(name, name) for name in there] else None
    ready = with_question_as_prompt(rename_columns(plain, columns))
    return ready if answer_after is None else extract_answers(ready, answer_after, first=first)


def hub_rows(name: str, *, streaming: bool = False) -> Any:
    """A split of a hub data set, as `load_rows` names it: a `datasets.Dataset`, or an `IterableDataset`."""
    import datasets

    repository, *selection = re.split(r":(?![^\[]*\])", name)  # a split may be cut: train[:100]
    if len(selection) > 2:
        raise InputError(f"data set '{name}': expected owner/name, owner/name:split or owner/name:config:split")
    split_name = selection[-1] if selection else "train"
    config = selection[0] if len(selection) == 2 else None
    unreachable = hub_problem(repository, "dataset")
    try:
        with hub_cache_only() if unreachable else nullcontext():
            return datasets.load_dataset(repository, config, split=split_name, streaming=streaming)
    except Exception as error:  # a loader can fail in as many ways as there are formats
        reason = unreachable or one_line(error)
        raise InputError(
            f"data set '{name}': no such file, and not to be had from the hub ({reason}); "
            f"give {PREFIX}TASK, a file ({', '.join(READERS)}) or a hub name"
        ) from error


def as_rows(rows: object) -> Rows:
    """A `datasets.Dataset` or any sequence of mappings as a list of dicts (new ones; the values are shared).

    A column that a row lacks is None there, as the `datasets` library has it.
    Raises: InputError for anything else, for an empty data set, or for a row that is no mapping, named.
    """
    if isinstance(rows, Mapping):
        raise InputError(
            f"the data is a mapping of {', '.join(map(str, rows)) or 'nothing'}; give one of these (a split), not all"
        )
    if not (isinstance(rows, Sequence) or (hasattr(rows, "__len__") and hasattr(rows, "column_names"))) or isinstance(
        rows, str
    ):
        lazy = "; give list(rows), or to SFT streaming=True" if hasattr(rows, "__iter__") else ""
        raise InputError(f"the data is a {type(rows).__name__}; expected a datasets.Dataset or a list of dicts{lazy}")
    plain: Rows = []
    from_arrow = hasattr(rows, "column_names")
    for number, row in enumerate(rows, start=1):  # type: ignore[arg-type, var-annotated]
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise InputError(
                f"row {number} of the data is a {type(row).__name__}; expected a dict with column names as keys"
            )
        plain.append(without_filled_keys(dict(row)) if from_arrow else dict(row))
    if not plain:
        raise InputError("the data set is empty")
    names = columns_of(plain)
    return [row if len(row) == len(names) else dict.fromkeys(names) | row for row in plain]


def columns_of(rows: Rows) -> list[str]:
    """The names of all columns, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def rename_columns(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Rows with columns renamed, old name to new. Raises: InputError for a missing column, or a name taken twice."""
    if not columns:
        return rows
    available = columns_of(rows)
    for old in columns:
        if old not in available:
            raise InputError(f"no column '{old}' to rename to '{columns[old]}'; the data has {', '.join(available)}")
    names = [columns.get(name, name) for name in available]
    for new in columns.values():
        if names.count(new) > 1:
            raise InputError(
                f"two columns would be named '{new}'; the data has {', '.join(available)}; rename the other one as well"
            )
    return [{columns.get(name, name): value for name, value in row.items()} for row in rows]


def with_question_as_prompt(rows: Rows) -> Rows:
    """Rows with a `question` and no `prompt`: it is their prompt too, unless they are whole texts or conversations."""

    def have(*names: str) -> bool:
        return any(row.get(name) is not None for row in rows for name in names)

    whole = have("messages", "conversations", "text", "input_ids") and not have(*JUDGED)
    if not have("question") or have("prompt") or whole:
        return rows
    return [{**row, "prompt": row["question"]} for row in rows]


def extract_answers(rows: Rows, marker: str, *, first: int = 1) -> Rows:
    """Rows whose column `answer` is what followed the last `marker` in it, stripped, with `1,234` written `1234`.

    Raises: InputError naming the first row whose answer is no text or holds no marker.
    """
    if "answer" not in columns_of(rows):
        raise InputError(f"no column 'answer' to cut after '{marker}'; the data has {', '.join(columns_of(rows))}")
    extracted = []
    for number, row in enumerate(rows, start=first):
        answer = row["answer"]
        if not isinstance(answer, str) or marker not in answer:
            raise InputError(f"row {number} of the data: no '{marker}' in its answer {str(answer)[-60:]!r}")
        extracted.append(row | {"answer": THOUSANDS.sub("", answer.rpartition(marker)[2].strip())})
    return extracted


def check_prompts(rows: Rows) -> None:
    """Require a string or messages as `prompt` in every row. Raises: InputError naming the row, counted from 1."""
    if not rows:
        raise InputError("the data set is empty")
    available = columns_of(rows)
    if "prompt" not in available:
        raise InputError(
            f"no column 'prompt'; the data has {', '.join(available)}; rename one with columns: {available[0]}=prompt"
        )
    for number, row in enumerate(rows, start=1):
        if problem := prompt_problem(row["prompt"]):
            raise InputError(f"row {number} of the data: {problem}")


def key(row: Row) -> str:
    """What makes two rows the same question: the text of the prompt (see `question`), white space apart."""
    return " ".join(question(row).split())


def split(rows: Rows, held_out: int, seed: int, *, whole_prompts: bool = False) -> tuple[Rows, Rows, int]:
    """Hold out `held_out` rows of distinct prompt text, and train on no row whose text is among them.

    Rows are drawn by `seed`, one whose text was drawn already is passed over. So what is frequent in the data is
    frequent in the held-out rows too, up to the number of its distinct texts.

    Args:
        whole_prompts: hold out every row of the drawn texts, not one of each.
    Returns: training rows (in order, repeats among themselves kept), held-out rows (in order), and how many further
        rows were left out of training because they repeat a held-out text.
    Raises: InputError if there are not more distinct texts than rows to hold out.
    """
    if held_out == 0:
        return rows, [], 0
    distinct = len({key(row) for row in rows})
    if held_out < 0 or held_out >= distinct:
        raise InputError(
            f"cannot hold out {held_out} of {len(rows)} rows: they have {distinct} distinct prompts, and at least "
            "one must be left to train on; hold out fewer or give more rows"
        )
    chosen: dict[str, int] = {}
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        chosen.setdefault(key(rows[index]), index)
        if len(chosen) == held_out:
            break
    train, _ = _without(rows, chosen)
    found = [row for row in rows if key(row) in chosen] if whole_prompts else [rows[i] for i in sorted(chosen.values())]
    return train, found, len(rows) - len(train) - len(found)


def distinct_rows(rows: Rows) -> Rows:
    """The first row of each prompt text, in order."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(key(row), row)
    return list(first.values())


def distinct_from(train: Rows, held_out: Rows) -> tuple[Rows, int]:
    """Training rows whose prompt text does not occur in `held_out`, and how many were left out.

    Raises: InputError if none is left.
    """
    kept, removed = _without(train, {key(row) for row in held_out})
    if not kept:
        raise InputError(
            f"all {len(train)} training prompts are among the {len(held_out)} held-out ones; evaluate on other rows"
        )
    return kept, removed


def _without(rows: Rows, keys: Collection[str]) -> tuple[Rows, int]:
    kept = [row for row in rows if key(row) not in keys]
    return kept, len(rows) - len(kept)


class PromptOrder:
    """An endless stream of row indices in reshuffled epochs; each index follows from (seed, position) alone.

    So a run that resumes needs to remember its position and nothing else. Every epoch holds each row once.
    """

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise InputError("there are no rows to take prompts from")
        self.count, self.seed = count, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, start: int, n: int) -> list[int]:
        """The `n` indices from position `start` on."""
        return [self._at(position) for position in range(start, start + n)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch[0]:
            self._epoch = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return int(self._epoch[1][offset])
