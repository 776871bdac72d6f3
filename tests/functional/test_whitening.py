"""Whitening against hand-worked numbers and loops; parts of a batch; what does not vary."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.advantages import group_relative
from taurl.functional.whitening import whiten, whiten_groups, whiten_rows, whitening_statistics

NAN, INF = math.nan, math.inf


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected) -> None:
    torch.testing.assert_close(found, double(expected), rtol=1e-12, atol=1e-14)


VALUES = [[1.0, 3.0, NAN], [5.0, math.inf, -9.0]]
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_whitening_by_hand():
    # 1, 3, 5: mean 3, unbiased std 2
    mean, std = whitening_statistics(double(VALUES), MASK)
    assert (mean.item(), std.item()) == (3.0, 2.0)
    close(whiten(double(VALUES), MASK, epsilon=0.5), [[-0.8, 0.0, 0.0], [0.8, 0.0, 0.0]])
    close(whiten(double(VALUES), MASK, epsilon=0.5, shift_mean=False), [[2.2, 3.0, 0.0], [3.8, 0.0, 0.0]])
    close(whiten(double([2.0, 4.0]), epsilon=1e-15), [-math.sqrt(0.5), math.sqrt(0.5)])


def test_whitening_equals_a_loop_over_any_shape():
    generator = torch.Generator().manual_seed(3)
    values = 3 + 2 * torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 3, 5, generator=generator) < 0.6
    counted = [v for v, m in zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]
    mean, std = statistics.fmean(counted), statistics.stdev(counted)
    expected = [
        (v - mean) / (std + 1e-4) if m else 0.0
        for v, m in zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True)
    ]
    close(whiten(values, mask), double(expected).reshape(4, 3, 5).tolist())


def test_what_is_masked_does_not_move_the_mean_of_equal_values():
    mask = torch.tensor([True, True, True, False])
    for number in (0.1, 1e308, -0.7):
        values = torch.full((4,), number, dtype=torch.float64)
        assert not whiten(values, mask).any()
        assert whitening_statistics(values, mask)[1] == 0


def test_rows_are_whitened_each_by_itself():
    generator = torch.Generator().manual_seed(5)
    values, mask = torch.randn(7, 9, generator=generator), torch.rand(7, 9, generator=generator) < 0.6
    mask[2], mask[3] = False, torch.arange(9) == 4
    values[5] = 2.5
    values[~mask] = math.nan
    alone = torch.stack([whiten(row, counts) for row, counts in zip(values, mask, strict=True)])
    torch.testing.assert_close(whiten_rows(values, mask), alone, rtol=0, atol=1e-7)
    assert not alone[[2, 3, 5]].any()
    with pytest.raises(ValueError, match=r"values are \[9\], expected \[M, N\]"):
        whiten_rows(values[0], mask[0])
    values[mask] = torch.inf
    with pytest.raises(ValueError, match="are NaN or infinite"):
        whiten_rows(values, mask)


def test_parts_whitened_by_the_statistics_of_the_whole():
    generator = torch.Generator().manual_seed(4)
    values, mask = torch.randn(9, 5, generator=generator), torch.rand(9, 5, generator=generator) < 0.7
    whole, figures = whiten(values, mask), whitening_statistics(values, mask)
    parts = [whiten(v, m, statistics=figures) for v, m in zip(values.split(2), mask.split(2), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    alone = [whiten(v, m) for v, m in zip(values.split(2), mask.split(2), strict=True)]
    assert (torch.cat(alone) - whole).abs().max() > 0.1


def test_whitening_what_does_not_vary():
    same = double([0.1, 0.1, 0.1])
    assert same.mean() != 0.1  # so a computed deviation would not be 0
    for values in (same, double([7.0]), torch.full((3, 2), 1e30)):
        assert not whiten(values, epsilon=1e-300).any()
        assert torch.equal(whiten(values, shift_mean=False), values)
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert not whiten(torch.full((2, 2), NAN), nothing).any()
    assert [figure.item() for figure in whitening_statistics(torch.full((2, 2), NAN), nothing)] == [0, 0]
    assert whiten(torch.zeros(0, 3)).shape == (0, 3)


def test_large_and_small_values_are_whitened_all_the_same():
    expected = double([[1.0, -1.0, 0.0]])
    torch.testing.assert_close(whiten(double([[1e250, -1e250, 0.0]])), expected)
    torch.testing.assert_close(whiten(double([[1e-250, -1e-250, 0.0]]), epsilon=1e-300), expected)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20))
@settings(max_examples=30)
def test_whitened_values_have_mean_zero_and_deviation_one(numbers):
    values = double(numbers)
    if values.std() > 0.1:
        assert abs(whiten(values, epsilon=1e-9).std() - 1) < 1e-6
        kept = whiten(values, epsilon=1e-9, shift_mean=False)
        assert abs(kept.std() - 1) < 1e-6
        assert abs(kept.mean() - values.mean()) < 1e-9


def test_bad_values_to_whiten_are_named():
    with pytest.raises(ValueError, match="1 of 3 values are NaN or infinite"):
        whiten(torch.tensor([0.0, math.inf, 1.0]))
    with pytest.raises(ValueError, match=r"mask is torch\.int64"):
        whiten(torch.zeros(2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected one shape"):
        whiten(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"values are torch\.int64"):
        whiten(torch.zeros(2, dtype=torch.int64))
    for epsilon in (0.0, -1.0, NAN, math.inf):
        with pytest.raises(ValueError, match=f"epsilon is {epsilon}"):
            whiten(torch.zeros(2), epsilon=epsilon)


# --- within groups


def test_groups_are_whitened_with_each_row_counting_once():
    values = double([[1, 3, NAN], [5, 8, 2], [4, 4, 4], [NAN, 7, INF], [1, NAN, NAN], [2, 2, 2]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    found = whiten_groups(values, mask, group_size=2, epsilon=1e-4)
    # Means 2, 5 and 4, 7; mean squares of what is off their middles 3.5 and 5.5.
    first, second = math.sqrt((2.5**2 + 0.5**2) / 2 + (1.5**2 + 4.5**2 + 1.5**2) / 3) + 1e-4, math.sqrt(4.5) + 1e-4
    close(found[0], [-2.5 / first, -0.5 / first, 0])
    close(found[1], [1.5 / first, 4.5 / first, -1.5 / first])
    close(found[2:4], [[-1.5 / second] * 3, [0, 1.5 / second, 0]])
    assert not found[4:].any()  # nothing to compare with


@pytest.mark.parametrize("masked", [True, False])
def test_tokens_that_differ_within_a_row_are_not_blown_up(masked):
    """Where only one row of a group is left, or all rows have one mean, ε alone would divide them."""
    values = double([[1.0, 1.1, 0.9], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True] * 3, [not masked] * 3])
    found = whiten_groups(values, mask, group_size=2)
    spread = math.sqrt(0.02 / 3) + 1e-4
    close(found, [[0] * 3] * 2 if masked else [[0, 0.1 / spread, -0.1 / spread], [0] * 3])


def test_equal_values_of_a_group_are_whitened_to_exactly_nothing():
    for value, size in ((0.1, 3), (1e12 / 3, 11)):
        values = torch.full((size, 2), value, dtype=torch.float64)
        assert not whiten_groups(values, torch.ones(size, 2, dtype=torch.bool), group_size=size).any()


def test_groups_of_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 of 3 values are NaN or infinite"):
        whiten_groups(double([[1.0, NAN], [2.0, INF]]), torch.tensor([[True, True], [True, False]]), group_size=2)


@given(st.integers(0, 2**32), st.integers(2, 5))
def test_one_value_a_row_gives_group_relative_advantages(seed, size):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (3, size), generator=generator).double() / 3
    mask = torch.rand(3 * size, 7, generator=generator) < 0.7
    mask[:, 0] = True
    found = whiten_groups(rewards.reshape(-1, 1).expand_as(mask), mask, group_size=size)
    expected = group_relative(rewards).reshape(-1, 1).expand_as(mask)
    torch.testing.assert_close(found, torch.where(mask, expected, 0.0), rtol=1e-10, atol=1e-12)


def test_a_batch_that_is_no_multiple_of_its_groups_is_refused():
    with pytest.raises(ValueError, match="N a multiple"):
        whiten_groups(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), group_size=2)
