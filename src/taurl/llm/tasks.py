"""The data of an online run: training prompts in order, held-out prompts, all as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from taurl.llm.chat import PromptFormat, encode_prompt
from taurl.llm.datasets import Rows, check_prompts, distinct_from, load_rows, prepare_rows, split
from taurl.runtime.errors import InputError


@dataclass(frozen=True)
class PromptReader:
    """How data rows are read and their prompts turned into token ids."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    max_tokens: int
    arguments: Mapping[str, Any]
    columns: Mapping[str, str]
    answer_after: str | None
    system_prompt: str | None
    prompt_format: PromptFormat
    chat_template_kwargs: Mapping[str, Any]

    def rows(self, source: object) -> Rows:
        """Rows of a data set given by name or as an object, with their prompts checked."""
        if source is None:
            raise InputError("no data set given: name one with dataset (for example reasoning-gym:chain_sum)")
        if isinstance(source, str):
            arguments = self.arguments if source.startswith("reasoning-gym:") else {}
            found = load_rows(source, arguments=arguments, columns=self.columns, answer_after=self.answer_after)
        else:
            found = prepare_rows(source, columns=self.columns, answer_after=self.answer_after)
        check_prompts(found)
        return found

    def encode(self, rows: Rows) -> list[list[int]]:
        """Token ids of each row's prompt; InputError where one leaves no room for max_tokens in the context."""
        encoded = []
        for index, row in enumerate(rows):
            ids = encode_prompt(
                row["prompt"],
                self.tokenizer,
                system_prompt=self.system_prompt,
                prompt_format=self.prompt_format,
                chat_template_kwargs=self.chat_template_kwargs,
                row=index,
            )
            if self.context and len(ids) + self.max_tokens > self.context:
                raise InputError(
                    f"row {index + 1} of the data: its prompt has {len(ids)} tokens; with max_tokens {self.max_tokens} "
                    f"that is more than the model's context of {self.context}: shorten it or lower max_tokens"
                )
            encoded.append(ids)
        return encoded


@dataclass(frozen=True)
class Prompts:
    """Rows with their token ids."""

    rows: Rows
    ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "Prompts":
        return Prompts([self.rows[index] for index in indices], [self.ids[index] for index in indices])


def train_and_held_out(
    reader: PromptReader, dataset: object, eval_dataset: object, eval_rows: int, seed: int
) -> tuple[Prompts, Prompts, int]:
    """Training and held-out prompts that share no text, and how many training rows were dropped for that.

    Without `eval_dataset` the held-out rows are taken out of `dataset`; with it, its first `eval_rows` are used.
    """
    rows = reader.rows(dataset)
    if eval_dataset is None:
        train, held_out, dropped = split(rows, eval_rows, seed)
    else:
        held_out = reader.rows(eval_dataset)[:eval_rows]
        train, dropped = distinct_from(rows, held_out)
    return Prompts(train, reader.encode(train)), Prompts(held_out, reader.encode(held_out)), dropped
