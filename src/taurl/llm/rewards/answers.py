"""Rewards that compare a completion with the answer of its row."""

import functools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from taurl.llm.rewards.text import tagged_answer, text_of

NUMBER = re.compile(
    r"""(?: (?<! [\w)\]}] ) (?P<sign> [-\u2212+] ) \$? )?         # in "5-3" and "(5)-3" the hyphen is an operator
        (?P<digits> [0-9]{1,3} (?: ,[0-9]{3} )+ (?! [0-9] )       # 1,234,567
                    (?: \.[0-9]+ )?
                  | [0-9]+ (?: \.[0-9]+ )?                        # a full stop that ends a sentence stays outside
                  | (?<! \. ) \.[0-9]+ )
        (?P<exponent> [eE][-+]?[0-9]{1,3} (?! \w ) )?""",
    re.VERBOSE,
)
FRACTION = re.compile(r"[0-9]\s*/\s*[0-9]+\s*$")  # at the end of an answer
MATH_VERIFY_SECONDS = 5  # math-verify's own default for one parse and for one comparison


def last_number(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0; None where the answer is None.

    A number has a sign if a minus (also U+2212) stands directly before it and nothing that it could be subtracted from
    directly before that: "12 - 30 = -18" ends in −18, "5-3" in 3. Commas between thousands and a full stop after it do
    not matter. A decimal fraction is one number, so "3.5" is not 5, and "18.00" equals 18.

    Raises: ValueError where an answer holds no number.
    """
    return [
        None if expected is None else float(_last_number(text_of(completion)) == _expected_number(expected))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def reasoning_gym(
    completions: Sequence[Any],
    question: Sequence[str],
    answer: Sequence[Any],
    metadata: Sequence[Mapping[str, Any]],
    **_: Any,
) -> list[float | None]:
    """The score in [0, 1] that the row's own reasoning-gym task gives, found by `metadata["source_dataset"]`.

    Scored is what stands between the last <answer> tags, or without tags the whole completion, stripped; 0 where the
    task's scorer raises an exception over it (some convert what they find to numbers without looking). None where the
    row has no metadata: it is of no such task. The scorer is that of the task with its default settings.
    """
    scores: list[float | None] = []
    for completion, *entry in zip(completions, question, answer, metadata, strict=True):
        if entry[-1] is None:
            scores.append(None)
            continue
        text = text_of(completion)
        tagged = tagged_answer(text)
        row = dict(zip(("question", "answer", "metadata"), entry, strict=True))
        scores.append(_task_score(text.strip() if tagged is None else tagged, row))
    return scores


def _task_score(answer: str, row: Mapping[str, Any]) -> float:
    score = _task_scorer(row["metadata"]["source_dataset"])
    try:
        return float(score(answer, row))
    except Exception:
        score(str(row["answer"]), row)  # raises where it is the row that cannot be scored
        return 0.0


def math_verify(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 where package math-verify finds the completion's result equal to the row's `answer`, else 0.0.

    None where the answer is None or holds no mathematics to compare with. Each parse and comparison has 5 seconds in
    the main thread; the package times by signals, which other threads cannot have, so there it runs without a limit.
    """
    from math_verify import parse, verify

    seconds = MATH_VERIFY_SECONDS if threading.current_thread() is threading.main_thread() else None
    parsed = functools.partial(parse, parsing_timeout=seconds)
    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        # A bare answer such as x^2+1 is recognised only between dollars.
        gold = [] if expected is None else parsed(str(expected)) or parsed(f"${expected}$")
        if not gold:
            scores.append(None)
            continue
        scores.append(float(verify(gold, parsed(text_of(completion)), timeout_seconds=seconds)))
    return scores


def _last_number(text: str) -> Decimal | None:
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    match = numbers[-1]
    value = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    return -value if match["sign"] in ("-", "\u2212") else value


def _expected_number(answer: Any) -> Decimal:
    number = _last_number(str(answer))
    if FRACTION.search(str(answer)):
        raise ValueError(
            f"last_number compares with one number, and the column `answer` has {answer!r}: see math_verify"
        )
    if number is None:
        raise ValueError(f"last_number needs a number in the column `answer`, found {answer!r}")
    return number


@functools.cache
def _task_scorer(name: str) -> Callable[[str, Mapping[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn  # a second to import

    scorer: Callable[[str, Mapping[str, Any]], float] = get_score_answer_fn(name)
    return scorer
