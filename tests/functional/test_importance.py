"""Importance ratios and weights against plain loops, and estimators against every sequence of a small policy."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.importance import (
    effective_sample_size,
    expected_return,
    expected_return_per_decision,
    mismatch_weights,
    per_decision_log_weights,
    sequence_ratios,
    sequence_token_ratios,
    token_ratios,
    trajectory_log_weights,
)

NAN = math.nan
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
seeds = st.integers(0, 2**31)
few = settings(max_examples=25)

# Every sequence over {0, 1, 2} that ends with its first 0 or after three tokens, and every prefix of one.
SEQUENCES = [
    s for n in (1, 2, 3) for s in itertools.product(range(3), repeat=n) if 0 not in s[:-1] and (n == 3 or not s[-1])
]
PREFIXES = sorted({s[:t] for s in SEQUENCES for t in range(len(s))})
MASK = torch.tensor([[t < len(s) for t in range(3)] for s in SEQUENCES])


def logprobs_of(logits: Tensor) -> Tensor:
    """log π(token | all before it) of every sequence, [15, 3], NaN after its end; logits [7, 3], one row per prefix."""
    table = logits.log_softmax(-1)
    rows = [
        [table[PREFIXES.index(s[:t]), s[t]] if t < len(s) else table.new_tensor(NAN) for t in range(3)]
        for s in SEQUENCES
    ]
    return torch.stack([torch.stack(row) for row in rows])


def probabilities(logprobs: Tensor) -> Tensor:
    return logprobs.masked_fill(~MASK, 0).sum(1).exp()


def random_tree(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under a policy and under the one that samples, and a reward for each prefix with its token."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, len(PREFIXES), 3, dtype=torch.float64, generator=generator)
    by_step = torch.randn(len(PREFIXES), 3, dtype=torch.float64, generator=generator)
    rewards = [[by_step[PREFIXES.index(s[:t]), s[t]] if t < len(s) else NAN for t in range(3)] for s in SEQUENCES]
    return logprobs_of(ours), logprobs_of(theirs), torch.tensor(rewards, dtype=torch.float64)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logprobs, old = -3 * torch.rand(2, 3, 5, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    return logprobs, old, mask


def test_token_ratios_equal_a_loop():
    logprobs, old, _ = example()
    result = token_ratios(logprobs, old)
    for row in range(3):
        for column in range(5):
            quotient = math.exp(logprobs[row, column].item()) / math.exp(old[row, column].item())
            assert result[row, column].item() == pytest.approx(quotient, rel=1e-14)


def test_first_ratio_is_one_and_carries_the_gradient():
    logprobs = example()[0].requires_grad_()
    ratios = token_ratios(logprobs, logprobs.detach())
    assert torch.equal(ratios, torch.ones(3, 5, dtype=torch.float64))
    ratios.sum().backward()
    assert torch.equal(logprobs.grad, torch.ones(3, 5, dtype=torch.float64))


def test_sequence_ratios_are_geometric_means():
    logprobs, old, mask = example()
    result = sequence_ratios(logprobs, old, mask)
    assert result.shape == (3, 5)
    for row in range(3):
        tokens = [math.exp((logprobs - old)[row, t].item()) for t in range(5) if mask[row, t]]
        expected = math.prod(tokens) ** (1 / len(tokens)) if tokens else 1.0
        assert result[row].tolist() == pytest.approx([expected] * 5, rel=1e-14)


def test_sequence_ratio_gradient_and_what_is_masked():
    logprobs, old, mask = example()
    assert torch.autograd.gradcheck(lambda x: sequence_ratios(x, old, mask), logprobs.clone().requires_grad_())
    spoiled = logprobs.masked_fill(~mask, NAN).requires_grad_()
    ratios = sequence_ratios(spoiled, old, mask)
    assert torch.equal(ratios, sequence_ratios(logprobs, old, mask))
    ratios.sum().backward()
    assert torch.equal(spoiled.grad != 0, mask)
    assert spoiled.grad.isfinite().all()


def test_huge_and_tiny_ratios_stay_finite():
    logprobs = torch.tensor([[0.0, -1e4, -80.0]], requires_grad=True)
    old = torch.tensor([[-1e4, 0.0, 0.0]])
    ratios = token_ratios(logprobs, old)
    assert ratios.isfinite().all()
    assert ratios[0, 0] > 1e25
    assert ratios[0, 1] == 0
    ratios.sum().backward()
    assert logprobs.grad.isfinite().all()
    assert token_ratios(old.bfloat16(), old.bfloat16()).dtype == torch.float32


def test_sequence_token_ratios_have_the_sequences_value_and_the_tokens_gradient():
    logprobs, old, mask = example()
    spoiled = logprobs.masked_fill(~mask, NAN).requires_grad_()
    ratios = sequence_token_ratios(spoiled, old, mask)
    expected = sequence_ratios(logprobs, old, mask)
    assert torch.allclose(ratios, expected, rtol=1e-15)
    ratios[0, 1].backward()  # s_01 depends on token 1 alone: ds = s · d log π
    assert spoiled.grad[0].tolist() == pytest.approx([0, expected[0, 0].item(), 0, 0, 0], rel=1e-14)
    assert torch.equal(spoiled.grad[1:], torch.zeros(2, 5, dtype=torch.float64))
    # Summed over a row the gradient is that of the sequence ratio, times how often that stands there.
    first, second = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    sequence_token_ratios(first, old, mask)[mask].sum().backward()
    sequence_ratios(second, old, mask)[mask].sum().backward()
    assert torch.allclose(first.grad, second.grad, rtol=1e-14)


def test_trajectory_and_per_decision_weights_equal_a_loop():
    logprobs, sampler, mask = example()
    spoiled = logprobs.masked_fill(~mask, NAN).requires_grad_()
    whole = trajectory_log_weights(spoiled, sampler, mask)
    steps = per_decision_log_weights(spoiled, sampler, mask)
    for row in range(3):
        product = 1.0
        for t in range(5):
            if mask[row, t]:
                product *= math.exp(logprobs[row, t].item()) / math.exp(sampler[row, t].item())
            assert steps[row, t].exp().item() == pytest.approx(product, rel=1e-13)
        assert whole[row].exp().item() == pytest.approx(product, rel=1e-13)
    (whole.sum() + steps.sum()).backward()
    assert torch.equal(spoiled.grad != 0, mask)
    assert torch.autograd.gradcheck(lambda x: trajectory_log_weights(x, sampler, mask), logprobs.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: per_decision_log_weights(x, sampler, mask), logprobs)
    assert per_decision_log_weights(logprobs[:1, :1], sampler[:1, :1], mask[:1, :1]).shape == (1, 1)


def test_estimates_by_hand():
    log_weights, returns = torch.tensor([2.0, 0.5, 0.0]).log(), torch.tensor([1.0, 4.0, 7.0])
    assert expected_return(returns, log_weights).item() == pytest.approx((2 + 2 + 0) / 3)
    assert expected_return(returns, log_weights, normalized=True).item() == pytest.approx(4 / 2.5)
    rewards, mask = torch.tensor([[1.0, 10.0], [2.0, NAN]]), torch.tensor([[True, True], [True, False]])
    steps = torch.tensor([[2.0, 6.0], [1.0, 1.0]]).log()
    assert expected_return_per_decision(rewards, steps, mask).item() == pytest.approx((2 + 2 + 60 + 0) / 2)
    found = expected_return_per_decision(rewards, steps, mask, normalized=True)
    assert found.item() == pytest.approx(4 / 3 + 60 / 7)


@given(seeds)
@few
def test_ordinary_weighting_is_unbiased(seed):
    """Over every pair of trajectories that θ' may draw, weighted by its probability, the estimates average E_θ[R]."""
    ours, theirs, rewards = random_tree(seed)
    returns = rewards.nansum(1)
    log_weights = trajectory_log_weights(ours, theirs, MASK)
    exact = (probabilities(ours) * returns).sum().item()
    drawn = probabilities(theirs).tolist()
    mean = sum(
        drawn[i] * drawn[j] * expected_return(returns[[i, j]], log_weights[[i, j]]).item()
        for i in range(15)
        for j in range(15)
    )
    assert mean == pytest.approx(exact, rel=1e-9, abs=1e-12)


@given(seeds)
@few
def test_per_decision_weighting_is_unbiased(seed):
    ours, theirs, rewards = random_tree(seed)
    steps = per_decision_log_weights(ours, theirs, MASK)
    exact = (probabilities(ours) * rewards.nansum(1)).sum().item()
    mean = sum(
        probability * expected_return_per_decision(rewards[[i]], steps[[i]], MASK[[i]]).item()
        for i, probability in enumerate(probabilities(theirs).tolist())
    )
    assert mean == pytest.approx(exact, rel=1e-9, abs=1e-12)


@given(seeds)
@few
def test_normalized_weighting_is_exact_on_the_whole_population(seed):
    """Consistency, without chance: θ' is uniform, each sequence drawn exactly as often as its probability says."""
    ours, _, rewards = random_tree(seed)
    theirs = torch.full((15, 3), -math.log(3), dtype=torch.float64)
    population = [i for i, s in enumerate(SEQUENCES) for _ in range(27 // 3 ** len(s))]
    assert len(population) == 27
    exact = (probabilities(ours) * rewards.nansum(1)).sum().item()
    log_weights = trajectory_log_weights(ours, theirs, MASK)[population]
    found = expected_return(rewards.nansum(1)[population], log_weights, normalized=True)
    assert found.item() == pytest.approx(exact, rel=1e-9, abs=1e-12)
    steps = per_decision_log_weights(ours, theirs, MASK)[population]
    found = expected_return_per_decision(rewards[population], steps, MASK[population], normalized=True)
    assert found.item() == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_normalized_weighting_is_biased_and_its_error_shrinks():
    ours, theirs, rewards = random_tree(4)
    returns, log_weights = rewards.nansum(1), trajectory_log_weights(ours, theirs, MASK)
    exact, drawn = (probabilities(ours) * returns).sum(), probabilities(theirs)
    # The expectation over every pair of trajectories that θ' may draw: biased, and with one alone its own return.
    expected = sum(
        drawn[i] * drawn[j] * expected_return(returns[[i, j]], log_weights[[i, j]], normalized=True)
        for i in range(15)
        for j in range(15)
    )
    assert abs(expected - exact) > 0.05
    alone = torch.stack([expected_return(returns[[i]], log_weights[[i]], normalized=True) for i in range(15)])
    assert abs((drawn * alone).sum() - (drawn * returns).sum()) < 1e-12
    generator = torch.Generator().manual_seed(0)
    errors = []
    for size in (20, 2000):
        draws = torch.multinomial(drawn, 100 * size, replacement=True, generator=generator).reshape(100, size)
        found = torch.stack([expected_return(returns[d], log_weights[d], normalized=True) for d in draws])
        errors.append((found - exact).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 5  # √(2000/20) = 10


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-5, 5)), min_size=1, max_size=9), st.floats(-3, 3))
@few
def test_normalized_weighting_stays_within_the_returns(pairs, constant):
    log_weights, returns = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = expected_return(returns, log_weights, normalized=True)
    assert returns.min() - 1e-9 <= found <= returns.max() + 1e-9
    same = expected_return(torch.full_like(returns, constant), log_weights, normalized=True)
    assert same.item() == pytest.approx(constant, abs=1e-9)


def test_estimates_of_huge_weights_lose_nothing_finite():
    returns = torch.tensor([1.0, 3.0])
    assert expected_return(returns, torch.tensor([5000.0, 5000.0]), normalized=True).item() == 2
    assert expected_return(returns, torch.tensor([-5000.0, -5000.0]), normalized=True).item() == 2
    assert expected_return(torch.zeros(2), torch.tensor([5000.0, -5000.0])).item() == 0
    assert expected_return(torch.tensor([1e-30, 0.0]), torch.tensor([100.0, 0.0])).item() == pytest.approx(
        1e-30 * math.exp(100) / 2
    )
    assert expected_return(returns, torch.tensor([5000.0, 0.0])).item() == math.inf
    assert expected_return(returns, torch.tensor([-math.inf, 0.0])).item() == 1.5
    assert expected_return(returns, torch.tensor([-math.inf, -math.inf])).item() == 0
    assert expected_return(returns.bfloat16(), torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("sign", [1, -1])
def test_estimates_in_float64_are_infinite_where_the_mean_is_and_nowhere_else(sign):
    def found(returns: list[float], log_weights: list[float]) -> float:
        numbers = (torch.tensor(rows, dtype=torch.float64) for rows in (returns, log_weights))
        return expected_return(*numbers).item()

    assert found([sign, 3.0], [5000.0, 0.0]) == sign * math.inf
    assert found([sign * 1e-320, 0.0], [2000.0, 0.0]) == sign * math.inf
    # e^1390 alone overflows
    expected = sign * math.exp(1390 - 300 * math.log(10)) / 2
    assert found([sign * 1e-300, 0.0], [1390.0, 0.0]) == pytest.approx(expected, rel=1e-11)
    assert found([sign * 1e300, 0.0], [-1390.0, -5000.0]) == pytest.approx(
        sign * math.exp(300 * math.log(10) - 1390) / 2
    )
    assert found([0.0, 0.0], [5000.0, -5000.0]) == 0
    log_weights = torch.tensor([5000.0, 0.0], dtype=torch.float64).requires_grad_()
    expected_return(torch.zeros(2, dtype=torch.float64), log_weights).backward()
    assert log_weights.grad.tolist() == [0, 0]


def test_gradients_of_the_estimates():
    generator = torch.Generator().manual_seed(5)
    returns, log_weights = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    rewards, steps = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 3, generator=generator) < 0.7
    for normalized in (False, True):
        assert torch.autograd.gradcheck(
            lambda w, n=normalized: expected_return(returns, w, normalized=n), log_weights.requires_grad_()
        )
        assert torch.autograd.gradcheck(
            lambda w, n=normalized: expected_return_per_decision(rewards, w, mask, normalized=n), steps.requires_grad_()
        )


def test_mismatch_weights_by_hand():
    ratios = torch.tensor([[4.0, 0.1, 1.5, NAN], [0.5, 0.5, 0.5, 9.0], [NAN, NAN, NAN, NAN]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    found = {
        mode: mismatch_weights(ratios.log().requires_grad_(), torch.zeros(3, 4), mask, mode=mode, low=0.2, high=2.0)
        for mode in MODES
    }
    expected = {
        "token_truncate": [[2, 0.2, 1.5, 0], [0.5, 0.5, 0.5, 2], [0] * 4],
        "token_mask": [[0, 0, 1.5, 0], [0.5, 0.5, 0.5, 0], [0] * 4],
        "sequence_truncate": [[0.6, 0.6, 0.6, 0], [1.125] * 4, [0] * 4],  # 4 · 0.1 · 1.5 and 9 / 8
        "sequence_mask": [[0.6, 0.6, 0.6, 0], [1.125] * 4, [0] * 4],
    }
    for mode, weights in expected.items():
        for row in range(3):
            assert found[mode][row].tolist() == pytest.approx(weights[row], rel=1e-14)
        assert not found[mode].requires_grad
    dropped = mismatch_weights(ratios.log(), torch.zeros(3, 4), mask, mode="sequence_mask", low=0.2, high=1.1)
    assert dropped[1].tolist() == [0] * 4
    kept = mismatch_weights(ratios.log(), torch.zeros(3, 4), mask, mode="sequence_truncate", low=0.2, high=1.1)
    assert kept[1].tolist() == pytest.approx([1.1] * 4)


@given(seeds, st.sampled_from(MODES), st.floats(0, 1), st.floats(1, 5))
@few
def test_mismatch_weights_are_in_range_and_exactly_one_without_a_mismatch(seed, mode, low, high):
    generator = torch.Generator().manual_seed(seed)
    logprobs, sampler = -torch.rand(2, 3, 5, generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    weights = mismatch_weights(logprobs, sampler, mask, mode=mode, low=low, high=high)
    inside = (weights >= low * 0.999999) & (weights <= high * 1.000001)
    assert (inside | (weights == 0))[mask].all()
    if mode.endswith("truncate"):
        assert inside[mask].all()
    assert (weights[~mask] == 0).all()
    same = mismatch_weights(logprobs, logprobs, mask, mode=mode, low=low, high=high)
    assert torch.equal(same, mask.float())


def test_mismatch_weights_without_bounds_are_the_ratios_and_do_not_overflow():
    logprobs, sampler, mask = example()
    weights = mismatch_weights(logprobs, sampler, mask, mode="token_truncate", high=math.inf)
    torch.testing.assert_close(weights, torch.where(mask, (logprobs - sampler).exp(), 0.0))
    far = torch.tensor([[-1e4, 0.0]])
    for mode in MODES:
        weights = mismatch_weights(far.flip(1).bfloat16(), far.bfloat16(), torch.ones(1, 2).bool(), mode=mode, high=2.0)
        assert weights.isfinite().all()
        assert weights.dtype == torch.float32
    with pytest.raises(ValueError, match="low is 3 and high is 2"):
        mismatch_weights(far, far, torch.ones(1, 2).bool(), mode="token_mask", low=3, high=2)
    with pytest.raises(ValueError, match="mode is 'tis', expected one of token_truncate"):
        mismatch_weights(far, far, torch.ones(1, 2).bool(), mode="tis", high=2)


def test_effective_sample_size():
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert effective_sample_size(torch.tensor([[3.0, 3.0, NAN], [3.0, 3.0, NAN]]), mask).item() == 4
    assert effective_sample_size(torch.tensor([[5.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), mask).item() == 1
    # (1 + 2 + 3 + 4)² / (1 + 4 + 9 + 16) = 100 / 30
    counting = torch.tensor([[1.0, 2.0, math.inf], [3.0, 4.0, 9.0]])
    assert effective_sample_size(counting, mask).item() == pytest.approx(10 / 3, rel=1e-6)
    assert effective_sample_size(counting * 1e30, mask).item() == pytest.approx(10 / 3, rel=1e-6)
    assert effective_sample_size(counting * 1e-30, mask).item() == pytest.approx(10 / 3, rel=1e-6)
    assert effective_sample_size(counting, torch.zeros_like(mask)).item() == 0
    assert effective_sample_size(torch.zeros(2, 3), mask).item() == 0
    assert effective_sample_size(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).item() == 0
    for shape in [(6,), (3, 2), (1, 2, 3)]:  # any shape, without a mask all count
        assert effective_sample_size(torch.full(shape, 7.0)).item() == 6
        some = torch.arange(6).reshape(shape) < 4
        assert effective_sample_size(torch.ones(shape).masked_fill(~some, NAN), some).item() == 4
    with pytest.raises(ValueError, match=r"mask is torch\.float32"):
        effective_sample_size(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"weights \[3\], mask \[3, 1\]"):
        effective_sample_size(torch.ones(3), torch.ones(3, 1).bool())


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=12))
@few
def test_effective_sample_size_is_between_one_and_their_number(log_weights):
    weights = torch.tensor(log_weights, dtype=torch.float64)
    size = effective_sample_size((weights - weights.amax()).exp()).item()
    assert 1 - 1e-9 <= size <= len(weights) + 1e-9


def test_shapes_do_not_broadcast():
    with pytest.raises(ValueError, match=r"logprobs \[2, 3\], other_logprobs \[2, 1\]"):
        token_ratios(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="boolean mask"):
        sequence_ratios(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask \[N, L\]"):
        sequence_ratios(torch.zeros(3), torch.zeros(3), torch.ones(3).bool())
    mask = torch.ones(2, 3).bool()
    for function in (sequence_token_ratios, trajectory_log_weights, per_decision_log_weights):
        with pytest.raises(ValueError, match="expected one shape"):
            function(torch.zeros(2, 3), torch.zeros(2, 1), mask)
        with pytest.raises(ValueError, match="expected one shape"):
            function(torch.zeros(2, 3), torch.zeros(2, 3), mask[:, :1])
    with pytest.raises(ValueError, match=r"returns \[2\], log_weights \[3\]"):
        expected_return(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="at least one trajectory"):
        expected_return(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="expected one shape"):
        expected_return_per_decision(torch.zeros(2, 3), torch.zeros(2), mask)
    with pytest.raises(ValueError, match="at least one trajectory"):
        expected_return_per_decision(torch.zeros(0, 3), torch.zeros(0, 3), mask[:0])
