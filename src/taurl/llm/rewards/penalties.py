"""Penalties on the shape of a completion, each made with its settings: `overlong_penalty(max_tokens=64, buffer=16)`."""

from collections.abc import Callable, Sequence
from typing import Any

from taurl.llm.rewards.text import text_of
from taurl.runtime.errors import InputError


def repetition_penalty(*, ngram_size: int = 3) -> Callable[..., list[float | None]]:
    """A reward function that returns minus the share of a completion's n-grams that occurred in it before, in (−1, 0].

        −(1 − distinct n-grams / n-grams)

    The n-grams are of tokens where `completion_ids` are given, else of words; a completion with no n-gram scores 0.
    Source: the n-gram measure of Yeo et al. 2025, arXiv:2502.03373, applied once to the whole completion.
    """
    if not isinstance(ngram_size, int) or ngram_size < 1:
        raise InputError(f"repetition_penalty: ngram_size is {ngram_size!r}, expected a whole number of at least 1")

    def reward(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, **_: Any
    ) -> list[float | None]:
        sequences = completion_ids if completion_ids is not None else [text_of(c).split() for c in completions]
        return [0.0 - _repeated_share(list(sequence), ngram_size) for sequence in sequences]

    return reward


def overlong_penalty(*, max_tokens: int, buffer: int) -> Callable[..., list[float | None]]:
    """A reward function that returns the soft overlong punishment, for a completion of |y| tokens:

        0                                      |y| ≤ max_tokens − buffer
        ((max_tokens − buffer) − |y|) / buffer  between, falling in a line
        −1                                     |y| ≥ max_tokens

    Source: DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13.
    """
    if not 0 < buffer <= max_tokens:
        raise InputError(
            f"overlong_penalty: buffer is {buffer!r} and max_tokens {max_tokens!r}, expected 0 < buffer <= max_tokens"
        )
    free = max_tokens - buffer

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [0.0 - min(max(len(ids) - free, 0) / buffer, 1.0) for ids in completion_ids]

    return reward


def _repeated_share(sequence: list[Any], size: int) -> float:
    ngrams = [tuple(sequence[start : start + size]) for start in range(len(sequence) - size + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
