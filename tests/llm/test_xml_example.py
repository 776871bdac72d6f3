"""The recipe's data: what SFT imitates is what the five rewards want."""

import importlib.util
from pathlib import Path

from taurl.llm.rewards.xml_format import (
    correctness_reward_func,
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

FILE = Path(__file__).parents[2] / "examples" / "xml_reasoning" / "run.py"


def test_the_answers_that_are_imitated_get_all_rewards():
    spec = importlib.util.spec_from_file_location("xml_reasoning", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = example.sums(400)
    assert len(rows) > 50
    completions = [row["completion"] for row in rows]
    assert set(correctness_reward_func(completions, [row["answer"] for row in rows])) == {2.0}
    for reward in (int_reward_func, soft_format_reward_func, strict_format_reward_func, xmlcount_reward_func):
        assert set(reward(completions)) == {0.5}
