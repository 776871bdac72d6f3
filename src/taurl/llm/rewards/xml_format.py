"""The five rewards of the GSM8K recipe that many people start from, for completions laid out as

    <reasoning>
    …
    </reasoning>
    <answer>
    …
    </answer>

with a newline at the end. Source: the GRPO demonstration on GSM8K by Will Brown (2025), whose names are kept. Two
things differ: `.` matches newlines (the published patterns never match a reasoning of several lines), and a completion
without a closed answer has no answer (the published code takes the whole text instead).
"""

import re
from collections.abc import Sequence
from typing import Any

from taurl.llm.rewards.text import tagged_answer, text_of

STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n", re.DOTALL)
SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
TAG_REWARD = 0.125  # four of them make 0.5
TRAILING_CHARACTER_COST = 0.001


def correctness_reward_func(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """2.0 where the tagged answer equals the row's `answer` as text, else 0.0; None where the row has none."""
    return [
        None if expected is None else 2.0 * (tagged_answer(text_of(completion)) == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


def int_reward_func(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """0.5 where the tagged answer is all digits, else 0.0."""
    return [0.5 * (tagged_answer(text_of(completion)) or "").isdecimal() for completion in completions]


def strict_format_reward_func(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """0.5 where the whole completion has the layout, each tag on a line of its own and a final newline, else 0.0.

    What stands between the tags may be anything, tags included: that each occurs once is `xmlcount_reward_func`'s part.
    """
    return [0.5 * bool(STRICT.fullmatch(text_of(completion))) for completion in completions]


def soft_format_reward_func(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """0.5 where the completion begins with reasoning and then answer tags, any white space between them, else 0.0."""
    return [0.5 * bool(SOFT.match(text_of(completion))) for completion in completions]


def xmlcount_reward_func(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """0.125 for each of four tags that occurs exactly once, less 0.001 for each character after the closing tag.

    The text after the closing tag is charged twice, with the third and with the fourth tag, as the recipe counts it:
    after `\\n</answer>\\n` for the third, and after `\\n</answer>`, less one for the newline, for the fourth. Where the
    final newline is missing the third finds no closing tag and charges the whole text, so that a good completion of 347
    characters gets 0.154 where the newline would give 0.500. Can be negative.
    """
    return [_xmlcount(text_of(completion)) for completion in completions]


def _xmlcount(text: str) -> float:
    score = TAG_REWARD * sum(text.count(tag) == 1 for tag in ("<reasoning>\n", "\n</reasoning>\n"))
    if text.count("\n<answer>\n") == 1:
        score += TAG_REWARD - TRAILING_CHARACTER_COST * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        score += TAG_REWARD - TRAILING_CHARACTER_COST * (len(text.split("\n</answer>")[-1]) - 1)
    return score
