"""Answers to held-out rows, scored by reward functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from taurl.llm.data.data_files import Row
from taurl.llm.data.row_forms import last_exchange
from taurl.llm.data.token_rows import TokenRow, TokenRows
from taurl.llm.evaluation import Evaluation, TrainerState, evaluate, reward_columns
from taurl.llm.generation import Generator, Sampling
from taurl.llm.rewards import RewardSet
from taurl.llm.rewards.text import text_of
from taurl.runtime.errors import InputError


@dataclass
class Answering:
    """Answers to the questions of some rows.

    Attributes:
        rows: with the question as `prompt`.
        ids: of the prompts.
    """

    rows: list[dict[str, Any]]
    ids: list[list[int]]
    sampling: Sampling
    rewards: RewardSet
    generator: Generator
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(
        cls,
        settings: Any,
        rewards: RewardSet,
        held_out: TokenRows,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
    ) -> Self:
        """Greedy answers to the first `generate_rows` rows whose question leaves room for one.

        A question is what stands before a row's last answer.

        Args:
            context: most tokens of question and answer; None: no bound.
        Raises: InputError for a row without a question, for questions that all leave no room, and for a function that
            needs a column which is not there.
        """
        asked = [question_ids(last) for last in held_out.lasts]
        most = math.inf if context is None else max(0, context - settings.max_tokens)
        chosen = [i for i, ids in enumerate(asked) if len(ids) <= most][: settings.generate_rows]
        rows, ids = [as_asked(held_out.rows[i]) for i in chosen], [asked[i] for i in chosen]
        if [] in ids:
            raise InputError(
                f"generate_rows: held-out row {chosen[ids.index([])] + 1} has no question before its answer: give rows "
                "with a prompt, or generate_rows 0"
            )
        if not ids:
            raise InputError(
                f"generate_rows: no held-out question leaves room for max_tokens {settings.max_tokens} in the model's "
                f"context of {context}: lower it, or give generate_rows 0"
            )
        rewards.check_columns(reward_columns(rows))
        return cls(
            rows, ids, Sampling(settings.max_tokens, temperature=0, stop=settings.stop), rewards, generator, tokenizer
        )

    def __call__(self, step: int, steps: int, status: Callable[[str], None]) -> Evaluation:
        """Answer and score; `status` hears how far it is."""
        groups = self.generator.generate(
            self.ids,
            1,
            self.sampling,
            progress=lambda done, count: status(f"answering held-out rows: {done} of {count}"),
        )
        self.generator.release()  # training goes on
        completions = [group[0] for group in groups]
        return evaluate(self.rows, completions, self.tokenizer, self.rewards, TrainerState(step, steps))


def question_ids(row: TokenRow) -> list[int]:
    """The tokens before a row's last run of targets; none if there is no more than the first token."""
    start, trained = row.last_target, row.trained
    while trained[start - 1]:
        start -= 1
    return row.ids[:start] if start > 1 else []


def as_asked(row: Row) -> Row:
    """A row as reward functions see it: with its question as `prompt`, and its completion as `answer` where none is."""
    filled = {name: value for name, value in row.items() if value is not None}
    prompt, answer = last_exchange(row)
    return row | ({} if answer is None else {"answer": text_of(answer)}) | filled | {"prompt": prompt}
