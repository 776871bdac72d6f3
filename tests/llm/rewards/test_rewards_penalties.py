"""The repetition and the overlong penalty."""

import pytest

from taurl.llm.rewards import overlong_penalty, repetition_penalty
from taurl.runtime.errors import InputError


def test_repetition_is_the_share_of_ngrams_seen_before():
    # Bigrams of 1 2 1 2 1: (1,2) (2,1) (1,2) (2,1): 4, of which 2 distinct.
    ids = [[1, 2, 1, 2, 1], [1, 2, 3, 4], [7] * 11, [5], []]
    penalty = repetition_penalty(ngram_size=2)
    assert penalty(completions=[""] * 5, completion_ids=ids) == pytest.approx([-0.5, 0.0, -0.9, 0.0, 0.0])


def test_repetition_is_of_words_where_there_are_no_tokens():
    texts = ["a b a b a", [{"role": "assistant", "content": "all words differ here"}]]
    assert repetition_penalty(ngram_size=2)(completions=texts) == pytest.approx([-0.5, 0.0])


def test_repetition_counts_trigrams_unless_told():
    assert repetition_penalty()(completions=["x x x x"]) == pytest.approx([-0.5])


def test_overlong_follows_equation_13():
    penalty = overlong_penalty(max_tokens=64, buffer=16)
    lengths = [0, 47, 48, 49, 56, 63, 64, 65, 1000]
    expected = [0, 0, 0, -1 / 16, -0.5, -15 / 16, -1, -1, -1]
    assert penalty(completions=None, completion_ids=[[1] * length for length in lengths]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("factory", "settings", "words"),
    [
        (repetition_penalty, {"ngram_size": 0}, "ngram_size is 0"),
        (repetition_penalty, {"ngram_size": 2.5}, "ngram_size is 2.5"),
        (overlong_penalty, {"max_tokens": 8, "buffer": 9}, "buffer is 9 and max_tokens 8"),
        (overlong_penalty, {"max_tokens": 8, "buffer": 0}, "buffer is 0"),
    ],
)
def test_impossible_settings_are_refused(factory, settings, words):
    with pytest.raises(InputError, match=words):
        factory(**settings)
