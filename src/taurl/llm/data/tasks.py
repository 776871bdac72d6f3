"""Reads data sets of prompts as token ids, and parts the rows of any data set into training and held-out ones."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.data.completion_ids import Conversations
from taurl.llm.data.datasets import Reading, Rows, check_prompts, distinct_from, distinct_rows, split
from taurl.llm.models.heads import context_length
from taurl.runtime.errors import InputError, located


@dataclass(frozen=True)
class PromptReader:
    """How data rows are read and their prompts turned into token ids."""

    conversations: Conversations
    context: int | None
    max_tokens: int
    reading: Reading

    @classmethod
    def of(cls, settings: Any, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Self:
        """A reader with the settings of a config that has all of these by the same names."""
        return cls(
            conversations=Conversations.of(settings, tokenizer, model),
            context=context_length(model),
            max_tokens=settings.max_tokens,
            reading=Reading.of(settings),
        )

    def read(self, source: object, limit: int | None = None, *, distinct: bool = False) -> "Prompts":
        """The first `limit` rows of a data set given by name or as an object, with their prompts as token ids.

        With `distinct`, rows whose text came before are passed over.

        Raises: InputError, which names source and row, for what cannot be read or leaves no room for max_tokens.
        """
        if source is None:
            raise InputError("no data set given: name one with dataset (for example reasoning-gym:chain_sum)")
        with named(source):
            rows = self.reading.rows(source)
            check_prompts(rows)
            index_of = {id(row): index for index, row in enumerate(rows)}
            rows = (distinct_rows(rows) if distinct else rows)[:limit]
            return Prompts(rows, [self._encode(row, index_of[id(row)]) for row in rows])

    def for_other(self, source: object) -> "PromptReader":
        """The reader of a further data set."""
        return replace(self, reading=self.reading.of_other(source))

    def _encode(self, row: Mapping[str, Any], index: int) -> list[int]:
        where = f"row {index + 1} of the data"
        with located(where):
            conversations = self.conversations.of_row(row)
        ids = conversations.prompt(row["prompt"], where)
        if self.context and len(ids) + self.max_tokens > self.context:
            raise InputError(
                f"{where}: its prompt has {len(ids)} tokens; with max_tokens {self.max_tokens} "
                f"that is more than the model's context of {self.context}: shorten it or lower max_tokens"
            )
        return ids


def fingerprint(data: Any) -> str:
    """A hash of rows, whatever they hold; of objects that show as their place in memory it takes the type alone."""
    try:
        text = json.dumps(data, default=_shown, sort_keys=True)
    except TypeError:  # keys that are no strings, or cannot be sorted
        text = json.dumps(_with_plain_keys(data), default=_shown)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _shown(value: object) -> str:
    if isinstance(value, set | frozenset):  # whose order is another one in every process
        return f"{type(value).__name__} {sorted(map(_shown, value))}"
    text = str(value)
    return type(value).__name__ if f"{id(value):x}" in text else text


def _with_plain_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted(([str(key), _with_plain_keys(item)] for key, item in value.items()), key=lambda pair: pair[0])
    if isinstance(value, list | tuple):
        return [_with_plain_keys(item) for item in value]
    return value


@contextmanager
def named(source: object) -> Iterator[None]:
    """Put the name of a data set before an error about it that does not say it."""
    try:
        yield
    except InputError as error:
        if isinstance(source, str) and source not in str(error):
            raise InputError(f"{source}: {error}") from error
        raise


@dataclass(frozen=True)
class Prompts:
    """Rows with their token ids."""

    rows: Rows
    ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "Prompts":
        """The rows at these places."""
        return Prompts([self.rows[index] for index in indices], [self.ids[index] for index in indices])

    def fingerprint(self) -> str:
        """A hash of the rows and their token ids: other data, other order or another template give another."""
        return fingerprint([self.rows, self.ids])

    def of(self, rows: Rows) -> "Prompts":
        """Some of the rows, which are found by identity: `split` and `distinct_from` hand on the rows themselves."""
        place = {id(row): index for index, row in enumerate(self.rows)}
        return self.take([place[id(row)] for row in rows])


HELD_OUT = 200  # questions that a run evaluates on unless it says otherwise; they tell an accuracy to ± 0.07 or better


def held_out_count(eval_rows: int | None) -> int:
    """How many rows to evaluate on where enough are there that are not trained on."""
    return HELD_OUT if eval_rows is None else eval_rows


def train_and_held_out(
    reader: Any,
    dataset: object,
    eval_dataset: object,
    eval_rows: int | None,
    seed: int,
    *,
    whole_prompts: bool = False,
) -> tuple[Any, Any, int]:
    """Training and held-out rows that share no question, and how many training rows were dropped for that.

    Without `eval_dataset` the held-out rows are taken out of `dataset`: where their number is not given, a tenth of its
    distinct questions, up to 200. With it, its first `eval_rows` (200) distinct ones are used.

    Args:
        reader: a `PromptReader`, or another that reads rows of its own form as that does.
        whole_prompts: hold out all rows of a held-out question, not one of them.
    """
    read = reader.read(dataset)
    if eval_dataset is not None:
        held_out = reader.for_other(eval_dataset).read(eval_dataset, limit=held_out_count(eval_rows), distinct=True)
        train, dropped = distinct_from(read.rows, held_out.rows)
        return read.of(train), held_out, dropped
    if eval_rows is None:
        eval_rows = min(HELD_OUT, len(distinct_rows(read.rows)) // 10)
    try:
        train, chosen, dropped = split(read.rows, eval_rows, seed, whole_prompts=whole_prompts)
    except InputError as error:
        raise InputError(f"eval_rows is {eval_rows}: {error}") from error
    return read.of(train), read.of(chosen), dropped
