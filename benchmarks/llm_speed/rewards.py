"""Reward functions that both sides call with the same arguments."""

import re
from typing import Any


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def digits(completions: list[Any], **_: Any) -> list[float]:
    """The share of digits: hardly two completions have the same, so that no group is left out of the update."""
    texts = [text_of(completion) for completion in completions]
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in texts]


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of the completion is the answer."""
    found = [re.findall(r"-?\d+", text_of(completion)) for completion in completions]
    return [float(bool(numbers) and numbers[-1] == right) for numbers, right in zip(found, answer, strict=True)]


REWARDS = {"digits": digits, "last_number": last_number}
