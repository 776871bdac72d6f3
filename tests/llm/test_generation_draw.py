import itertools
import math

import numpy as np
import pytest
import torch

from taurl.llm.generation import Sampling
from taurl.llm.generation.draw import ROWS_AT_ONCE, draw, require_finite, truncate, uniforms
from taurl.runtime.errors import InputError, RunError

ALMOST_ONE = 1 - 2.0**-53


def drawn(logits, numbers, **options):
    """Tokens and logprobs of one distribution, a draw for each number."""
    logits = torch.as_tensor(logits)
    numbers = torch.as_tensor(numbers, dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(len(numbers), -1).clone(), numbers, Sampling(8, **options))
    return tokens.tolist(), logprobs.tolist()


def softmax(logits):
    exponentials = [math.exp(logit) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_even_grid_of_numbers_draws_every_token_as_often_as_its_probability_says(temperature, dtype):
    logits = [0.3, -1.0, 2.0, -4.0, 1.1, 0.0, -2.5]
    count = 10_000
    tokens, logprobs = drawn(
        torch.tensor(logits, dtype=dtype), (np.arange(count) + 0.5) / count, temperature=temperature
    )
    probabilities = softmax([logit / temperature for logit in logits])
    for token, probability in enumerate(probabilities):
        assert abs(tokens.count(token) - count * probability) <= 1
    expected = [math.log(probabilities[token]) for token in tokens]
    assert logprobs == pytest.approx(expected, abs=1e-12 if dtype == torch.float64 else 1e-6)


def test_keyed_numbers_pass_a_chi_square_test():
    logits = [0.3, -1.0, 2.0, -2.0, 1.1]
    numbers = np.concatenate([uniforms((3, 9), prompt, 0, 500) for prompt in range(40)])
    tokens, _ = drawn(torch.tensor(logits), numbers)
    expected = [len(numbers) * probability for probability in softmax(logits)]
    statistic = sum((tokens.count(token) - count) ** 2 / count for token, count in enumerate(expected))
    assert statistic < 18.47  # the 0.999 quantile with 4 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_of_probability_zero_is_never_drawn(dtype):
    vocabulary = 50_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[::2] = -math.inf
    logits[:3] = logits[-3:] = -math.inf
    logits[500:600] = -1e4  # underflows
    edges = [0.0, 5e-324, 2.0**-60, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-25, ALMOST_ONE]
    tokens, logprobs = drawn(logits, edges)
    assert all(logits[token] > -100 for token in tokens)
    assert np.isfinite(logprobs).all()
    assert tokens == sorted(tokens)
    assert tokens[0] == 3


def test_numbers_at_both_ends_draw_the_first_and_the_last_possible_token():
    for dtype in (torch.float32, torch.float64):
        assert drawn(torch.tensor([1.0, 2.0, 0.5], dtype=dtype), [0.0, ALMOST_ONE])[0] == [0, 2]
        assert drawn(torch.tensor([-math.inf, 2.0, 0.5, -math.inf], dtype=dtype), [0.0, ALMOST_ONE])[0] == [1, 2]
        assert drawn(torch.tensor([5.0, 0.0, 0.0], dtype=dtype), [0.0, ALMOST_ONE], top_k=1)[0] == [0, 0]


def test_temperature_zero_takes_the_most_likely_token_for_certain():
    tokens, logprobs = drawn(torch.tensor([0.0, 3.0, 2.9]), [0.0, 0.5, ALMOST_ONE], temperature=0)
    assert tokens == [1, 1, 1]
    assert logprobs == [0.0, 0.0, 0.0]


def test_a_tiny_temperature_is_greedy_and_a_huge_one_even():
    logits = torch.tensor([0.0, 3.0, 2.9, 1.0])
    assert drawn(logits, [0.0, 0.5, ALMOST_ONE], temperature=1e-38) == ([1, 1, 1], [0.0, 0.0, 0.0])
    assert drawn(logits, [0.0, 0.5, ALMOST_ONE], temperature=1e-46) == ([1, 1, 1], [0.0, 0.0, 0.0])  # 0 in float32
    tokens, logprobs = drawn(logits, [0.1, 0.3, 0.6, 0.9], temperature=1e30)
    assert tokens == [0, 1, 2, 3]
    assert logprobs == pytest.approx([-math.log(4)] * 4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_many_rows_are_drawn_in_parts_and_as_each_alone(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * ROWS_AT_ONCE + 5, 11, generator=generator)
    numbers = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    sampling = Sampling(8, temperature=temperature, top_k=7)
    tokens, logprobs = draw(logits, numbers, sampling)
    alone = [draw(logits[row : row + 1], numbers[row : row + 1], sampling) for row in range(len(logits))]
    assert tokens.tolist() == [int(token) for token, _ in alone]
    assert logprobs.tolist() == [float(logprob) for _, logprob in alone]
    assert len(set(tokens.tolist())) > 3


def test_draw_leaves_the_logits_as_they_are():
    logits = torch.randn(3, 9)
    before = logits.clone()
    draw(logits, torch.rand(3, dtype=torch.float64), Sampling(1, temperature=0.5, top_k=4, top_p=0.8, min_p=0.1))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_named(bad, temperature):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    tokens, logprobs = draw(logits, torch.full((3,), 0.5, dtype=torch.float64), Sampling(1, temperature=temperature))
    assert (tokens < 5).all()  # none that the model could stumble over before anybody looks
    with pytest.raises(RunError, match="not finite in 1 of 3 sequences") as caught:
        require_finite(logprobs)
    assert "\n" not in str(caught.value)


def kept(scores, *, top_k=0, top_p=1.0, min_p=0.0):
    """The tokens that stay, by a plain loop over sorted lists."""
    tokens = sorted(range(len(scores)), key=lambda token: -scores[token])  # stable: the first of those that tie
    if 0 < top_k < len(scores):
        tokens = [token for token in tokens if scores[token] >= scores[tokens[top_k - 1]]]
    probabilities = softmax([scores[token] for token in tokens])
    if top_p < 1:
        reached, count = 0.0, 0
        while reached < top_p and count < len(tokens):
            reached += probabilities[count]
            count += 1
        tokens = tokens[:count]
    return {token for token in tokens if math.exp(scores[token] - scores[tokens[0]]) >= min_p}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 1e-9},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.15},
    ],
)
def test_truncation_keeps_what_a_plain_loop_keeps(options):
    scores = 2 * torch.randn(50, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = truncate(scores, Sampling(1, **options))
    for row, values in enumerate(scores.tolist()):
        staying = kept(values, **options)
        assert {token for token in range(12) if found[row, token] > -math.inf} == staying
        assert all(found[row, token] == values[token] for token in staying)


def test_ties():
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]])

    def staying(**options):
        return torch.nonzero(truncate(tied, Sampling(1, **options))[0] > -math.inf).flatten().tolist()

    assert staying(top_k=1) == [1, 2, 4]  # all that tie for the last place
    assert staying(top_k=4) == [0, 1, 2, 4, 5]
    assert staying(top_p=0.01) == [1]  # the smallest set: the first of those that tie
    assert staying(top_p=0.3) == [1, 2]
    assert staying(min_p=1.0) == [1, 2, 4]


def test_logprobs_are_renormalised_over_what_truncation_keeps():
    logits = [0.3, -1.0, 2.0, -4.0, 1.1, 0.0]
    options = {"top_k": 4, "top_p": 0.95, "min_p": 0.1}
    scores = [logit / 0.7 for logit in logits]
    staying = kept(scores, **options)
    assert 1 < len(staying) < 6
    total = sum(math.exp(scores[token]) for token in staying)
    tokens, logprobs = drawn(
        torch.tensor(logits, dtype=torch.float64), np.arange(200) / 200, temperature=0.7, **options
    )
    assert set(tokens) == staying
    assert logprobs == pytest.approx([scores[token] - math.log(total) for token in tokens], abs=1e-12)


def test_every_completion_has_a_stream_of_its_own():
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1), (2**40, 7, 3, 2)]
    streams = [uniforms((seed, step), prompt, completion, 64) for seed, step, prompt, completion in places]
    for one, other in itertools.combinations(streams, 2):
        assert not np.intersect1d(one, other).size
    for place, stream in zip(places, streams, strict=True):
        seed, step, prompt, completion = place
        assert np.array_equal(uniforms((seed, step), prompt, completion, 64), stream)
        assert np.array_equal(uniforms((seed, step), prompt, completion, 10), stream[:10])  # whatever max_tokens is
        assert stream.dtype == np.float64
        assert (stream >= 0).all()
        assert (stream < 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"stop": ("a", "")}, "stop is \\('a', ''\\)"),
        ({"stop": "end"}, "stop is 'end', expected a tuple"),
    ],
)
def test_sampling_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**{"max_tokens": 4} | options)
