"""How many rows go through a model together."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from taurl.llm.scoring.budget import TOKENS_WHOSE_KEYS_WEIGH_ONE, Size, fitting

SIZES = st.lists(st.builds(Size, *[st.integers(1, 9)] * 4), max_size=12)


def padded(run):
    """Tokens of a run, counted cell by cell, and the keys and values that each completion has of its prompt."""
    completions = [size.length for size in run for _ in range(size.completions)]
    prompts = [size.prompt_length for size in run for _ in range(size.prompts)]
    copied = len(completions) * max(prompts) // TOKENS_WHOSE_KEYS_WEIGH_ONE
    return len(completions) * max(completions) + len(prompts) * max(prompts) + copied


@given(SIZES, st.integers(1, 400))
def test_runs_hold_every_item_in_order_and_as_many_as_fit(sizes, tokens):
    runs = list(fitting(sizes, lambda size: size, tokens))
    assert [size for run in runs for size in run] == sizes
    assert all(run and (len(run) == 1 or padded(run) <= tokens) for run in runs)
    assert all(padded([*run, after[0]]) > tokens for run, after in pairwise(runs))


def test_two_short_rows_pay_for_the_longest_beside_them():
    rows = [Size(1, 2), Size(1, 2), Size(1, 5)]
    assert list(map(len, fitting(rows, lambda size: size, 14))) == [2, 1]
    assert list(map(len, fitting(rows, lambda size: size, 15))) == [3]


def test_copies_of_long_prompts_are_no_longer_for_nothing():
    """64 answers of 8 tokens to a prompt of 1,500: what they copy of it weighs more than they do."""
    rows = [Size(1, 8, 0, 1500)] * 64
    assert [len(run) for run in fitting(rows, lambda size: size, 548)] == [10] * 6 + [4]
