"""The answers of a data set, ready to be taken as batches: pairs, or single answers that were liked or not."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Self

import torch

from taurl.llm.data.preference_rows import Preferences
from taurl.llm.scoring.answer_batches import AnswerBatch
from taurl.runtime.errors import InputError


@dataclass(frozen=True)
class GivenAnswers:
    """R prompts with K answers each, as token ids.

    Attributes:
        prompts: R lists of token ids.
        answers: R lists of K lists of token ids.
        desirable: of single answers, which were liked; empty for pairs.
    """

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    desirable: list[bool]

    @classmethod
    def pairs(cls, rows: Preferences) -> Self:
        """Chosen and rejected answers."""
        return cls([row.prompt for row in rows.judged], [row.completions for row in rows.judged], [])

    @classmethod
    def single(
        cls, rows: Preferences, *, mismatched: bool, others: Preferences | None = None, longest: int | None = None
    ) -> Self:
        """Answers with a label, 0 or 1; of a pair the chosen one is liked and the rejected one is not.

        Args:
            mismatched: add to each an answer to the next prompt, for KTO's reference point: the first one to its
                prompt has the first one to the next, the second the second, so that both kinds of a pair are there.
                It is chosen once, and not in each batch, so that the reference has to judge it once.
            others: rows whose answers are taken for that where all prompts of `rows` are one.
            longest: tokens to which a prompt with an answer to another is cut; None: not.
        Raises: InputError where all prompts are one.
        """
        prompts, answers, desirable = [], [], []
        for row in rows.judged:
            for completion, label in zip(row.completions, row.values, strict=True):
                prompts.append(row.prompt)
                answers.append([completion])
                desirable.append(label == 1)
        if mismatched and prompts:
            beyond = [row for row in others.judged if row.prompt != prompts[0]] if others else []
            if beyond and all(prompt == prompts[0] for prompt in prompts):
                given = [completion for row in beyond for completion in row.completions]
                answers = [[*answer, given[place % len(given)]] for place, answer in enumerate(answers)]
            else:
                places = _of_another_prompt(prompts)
                answers = [[*answer, answers[place][0]] for answer, place in zip(answers, places, strict=True)]
            if longest is not None:
                answers = [
                    [own, other[: longest - len(prompt)]] for prompt, (own, other) in zip(prompts, answers, strict=True)
                ]
        return cls(prompts, answers, desirable)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def count(self) -> int:
        """K."""
        return len(self.answers[0])

    def take(self, rows: Sequence[int], device: torch.device) -> AnswerBatch:
        """The rows at these places."""
        return AnswerBatch.of([self.prompts[row] for row in rows], [self.answers[row] for row in rows], device)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all token ids."""
        return hashlib.sha256(json.dumps([self.prompts, self.answers]).encode()).hexdigest()


def _of_another_prompt(prompts: Sequence[list[int]]) -> list[int]:
    """For each row the place of one among the next rows, around the end, whose prompt differs."""
    runs = [list(rows) for _, rows in groupby(range(len(prompts)), key=prompts.__getitem__)]
    if len(runs) == 1:
        raise InputError(
            f"all {len(prompts)} rows have one prompt; kto compares with answers to another (apo_zero_unpaired does "
            "not)"
        )
    places = []
    for run, following in zip(runs, [*runs[1:], runs[0]], strict=True):
        if prompts[following[0]] == prompts[run[0]]:  # the first prompt is the last one too
            following = runs[1]
        places += [following[number % len(following)] for number in range(len(run))]
    return places
