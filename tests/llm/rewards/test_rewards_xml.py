"""The five rewards of the GSM8K recipe."""

import pytest

from taurl.llm.rewards import (
    correctness_reward_func,
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

GOOD = "<reasoning>\nOne.\nTwo lines.\n</reasoning>\n<answer>\n42\n</answer>\n"


def one(function, text, **columns):
    """The reward of one completion, as a string and as a message list, which must agree."""
    messages = [{"role": "assistant", "content": text}]
    columns = {name: [value, value] for name, value in columns.items()}
    as_text, as_messages = function(prompts=["?"] * 2, completions=[text, messages], completion_ids=None, **columns)
    assert as_text == as_messages
    return as_text


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        (GOOD, "42", 2.0),
        (GOOD, 42, 2.0),
        (GOOD, "43", 0.0),
        ("<answer>1</answer><answer> 42 </answer>", "42", 2.0),
        ("<answer>42</answer><answer>1</answer>", "42", 0.0),
        ("<answer>42.0</answer>", "42", 0.0),  # compared as text
        ("42", "42", 0.0),  # not between tags
        ("<answer>42", "42", 0.0),
        (GOOD, None, None),
    ],
)
def test_correctness(text, answer, reward):
    assert one(correctness_reward_func, text, answer=answer) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 0.5),
        ("<answer>-42</answer>", 0.0),
        ("<answer>4 2</answer>", 0.0),
        ("<answer></answer>", 0.0),
        ("42", 0.0),
    ],
)
def test_int(text, reward):
    assert one(int_reward_func, text) == reward


@pytest.mark.parametrize(
    ("text", "strict", "soft"),
    [
        (GOOD, 0.5, 0.5),  # several lines of reasoning
        (GOOD.replace("42", "4\n2"), 0.5, 0.5),
        (GOOD.removesuffix("\n"), 0.0, 0.5),
        (GOOD + "\n", 0.0, 0.5),
        (GOOD + "more", 0.0, 0.5),
        ("Sure. " + GOOD, 0.0, 0.0),
        ("\n" + GOOD, 0.0, 0.0),
        (GOOD.replace("\n", ""), 0.0, 0.5),
        (GOOD.replace("</reasoning>\n", "</reasoning> \n\t "), 0.0, 0.5),
        (GOOD.replace("</reasoning>\n", "</reasoning>\nso\n"), 0.0, 0.0),
        (GOOD.replace("</reasoning>", ""), 0.0, 0.0),
        (GOOD.replace("</answer>", ""), 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_formats(text, strict, soft):
    assert one(strict_format_reward_func, text) == strict
    assert one(soft_format_reward_func, text) == soft


def test_xmlcount_of_the_known_pair():
    """Without its final newline the same completion is charged for its whole text: 347 characters, 0.346 less."""
    frame = len("<reasoning>\n\n</reasoning>\n<answer>\n42\n</answer>")
    text = f"<reasoning>\n{'x' * (347 - frame)}\n</reasoning>\n<answer>\n42\n</answer>"
    assert len(text) == 347
    assert one(xmlcount_reward_func, text + "\n") == pytest.approx(0.500, abs=1e-12)
    # 4 × 0.125 − 0.347 (no "\n</answer>\n" to split at) − 0.001 × (0 − 1)
    assert one(xmlcount_reward_func, text) == pytest.approx(0.154, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 0.5),
        (GOOD + "12345", 0.5 - 0.005 - 0.005),  # 5 after the newline; 6 after the tag, less one
        ("<reasoning>\n" + GOOD, 0.375),
        (GOOD.replace("\n</reasoning>\n", ""), 0.25),  # the newline before <answer> goes too: two tags less
        (GOOD.replace("<reasoning>\n", "<reasoning>"), 0.375),
        # Two closing tags: the fourth is not exactly once; the third counts from the last of them.
        (GOOD + "ab\n</answer>\nxyz", 0.375 - 0.003),
        ("no tags", 0.0),
        ("", 0.0),
    ],
)
def test_xmlcount(text, reward):
    assert one(xmlcount_reward_func, text) == pytest.approx(reward, abs=1e-12)
