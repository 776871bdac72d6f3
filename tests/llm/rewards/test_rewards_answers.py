"""last_number, reasoning_gym, math_verify and the reading of completions."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from reasoning_gym import create_dataset

from taurl.llm.rewards import last_number, math_verify, reasoning_gym, tagged_answer, text_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 - 30 = -18", "-18"),
        ("12 - 30 = −18", "-18"),  # U+2212
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("5 --3", "-3"),
        ("(2+6)-3", "3"),
        ("COVID-19", "19"),
        ("the total is 1,234,567.", "1234567"),
        ("between 1,2,3", "3"),
        ("= 5.", "5"),
        ("= 5.\n", 5),
        ("**-7**", -7),
        ("\\boxed{-7}", np.int64(-7)),
        ("she owes -$40", "-40"),
        ("+8", "8"),
        ("18.00 dollars", "18"),
        ("18", 18.0),
        ("3.5", "3.5"),
        ("1,234.50", "1234.5"),
        ("18", "#### 18"),
        ("1234", "1,234"),
        ("007", "7"),
        ("1e-05", "0.00001"),
        ("10000000000000000", 1e16),
        ("16 eggs", "16"),
        ("9" * 5000, "9" * 5000),  # more digits than int() reads
    ],
)
def test_last_number_equals_the_answer(text, answer):
    assert last_number(completions=[text], answer=[answer]) == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5-3", "-3"),
        ("5 - 3", "-3"),
        ("12 - 30 = 18", "-18"),
        ("3.5", "5"),
        (".5", "5"),
        ("18.50", "18"),
        ("18 and then 4", "18"),
        ("1,234", "234"),
        ("no number at all", "0"),
        ("1e99999999999999999999", "1"),  # further than a number can be
        ("", "0"),
    ],
)
def test_last_number_differs_from_the_answer(text, answer):
    assert last_number(completions=[text], answer=[answer]) == [0.0]


def test_last_number_does_not_apply_without_an_answer_and_refuses_one_without_a_number():
    assert last_number(completions=["4", "4"], answer=[None, "4"]) == [None, 1.0]
    with pytest.raises(ValueError, match=r"number in the column `answer`, found 'four'"):
        last_number(completions=["4"], answer=["four"])
    with pytest.raises(ValueError, match="compares with one number"):
        last_number(completions=["2"], answer=["1/2"])


def test_text_of_strings_and_messages():
    assert text_of("plain") == "plain"
    assert text_of([{"role": "assistant", "content": "one"}]) == "one"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    conversation = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "99"},
        {"role": "assistant", "content": parts},
    ]
    assert text_of(conversation) == "\nab"
    assert last_number(completions=[conversation], answer=["99"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>\n4\n</answer>", "4"),
        ("<answer>3</answer> no: <answer> 4 </answer> done </answer>", "4"),
        ("<answer></answer>", ""),
        ("4", None),
        ("<answer>4", None),
        ("4</answer>", None),
        ("<answer>4</answer><answer>5", None),
    ],
)
def test_tagged_answer(text, answer):
    assert tagged_answer(text) == answer


def test_reasoning_gym_scores_each_row_with_its_own_task():
    sums = create_dataset("chain_sum", size=2, seed=3)
    # countdown accepts any expression that reaches the target: its own scorer is needed to see that.
    countdown = create_dataset("countdown", size=1, seed=3)[0]
    expression = countdown["metadata"]["expression"]
    rows = [sums[0], sums[1], sums[1], countdown, countdown]
    completions = [
        f"Let me think: 1 + 1.\n<answer> {sums[0]['answer']} </answer>",
        f"  {sums[1]['answer']}\n",
        "<answer>no idea</answer>",
        [{"role": "assistant", "content": f"<answer>({expression})</answer>"}],
        "<answer>1</answer>",
    ]
    columns = {name: [row[name] for row in rows] for name in ("question", "answer", "metadata")}
    scores = reasoning_gym(prompts=["?"] * 5, completions=completions, completion_ids=None, **columns)
    assert scores[:4] == [1.0, 1.0, 0.0, 1.0]
    assert scores[4] < 0.1


def test_what_a_tasks_scorer_cannot_read_scores_0_and_a_row_that_it_cannot_read_is_an_error():
    row = create_dataset("prime_factorization", size=1, seed=1)[0]

    def scored(completion, row):
        return reasoning_gym([completion], [row["question"]], [row["answer"]], [row["metadata"]])

    assert scored("They are 2 × three, I think", row) == [0.0]  # the scorer converts to integers without looking
    assert scored(row["answer"], row) == [1.0]
    with pytest.raises(ValueError, match="invalid literal"):
        scored("2 × three", {**row, "answer": "two"})


def test_math_verify_knows_equal_mathematics():
    completions = ["It is $\\frac{1}{2}$", "so 0.5", "so 0.6", "$1 + x^2$", "nothing", "3"]
    answers = ["1/2", "1/2", "1/2", "x^2+1", "7", None]
    assert math_verify(completions=completions, answer=answers) == [1.0, 1.0, 0.0, 1.0, 0.0, None]


def test_math_verify_works_outside_the_main_thread():
    found = []
    arguments = {"completions": ["so 0.5"], "answer": ["1/2"]}
    thread = threading.Thread(target=lambda: found.extend(math_verify(**arguments)))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_importing_the_rewards_imports_nothing_heavy():
    code = "import sys, taurl.llm.rewards; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "reasoning_gym", "math_verify", "sympy", "datasets"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
