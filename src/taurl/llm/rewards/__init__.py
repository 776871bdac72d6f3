"""Reward functions: those that ship, those that users bring, and how a batch is scored by several of them.

A reward function is `f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=, log_metric=)`,
sync or async, and returns one number or None ("does not apply to this row") for each completion.
"""

from taurl.llm.rewards.answers import last_number, math_verify, reasoning_gym
from taurl.llm.rewards.model import reward_model
from taurl.llm.rewards.penalties import overlong_penalty, repetition_penalty
from taurl.llm.rewards.reward_set import RewardSet, Scores
from taurl.llm.rewards.text import tagged_answer, text_of
from taurl.llm.rewards.xml_format import (
    correctness_reward_func,
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

SHIPPED = (
    "last_number",
    "reasoning_gym",
    "math_verify",
    "repetition_penalty",
    "overlong_penalty",
    "correctness_reward_func",
    "int_reward_func",
    "strict_format_reward_func",
    "soft_format_reward_func",
    "xmlcount_reward_func",
    "reward_model",
)
"""The names that can be written without their module."""

__all__ = [
    "SHIPPED",
    "RewardSet",
    "Scores",
    "correctness_reward_func",
    "int_reward_func",
    "last_number",
    "math_verify",
    "overlong_penalty",
    "reasoning_gym",
    "repetition_penalty",
    "reward_model",
    "soft_format_reward_func",
    "strict_format_reward_func",
    "tagged_answer",
    "text_of",
    "xmlcount_reward_func",
]
