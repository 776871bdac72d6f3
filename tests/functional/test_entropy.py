"""The tokens with the highest entropies, against sorting by hand; ties, masks, and parts of a batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.entropy import top_entropy_mask

ENTROPIES = torch.tensor([[0.1, 0.9, 0.4, 9.0], [0.7, 9.0, 0.2, 0.3]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)  # 0.1 0.9 0.4 0.7 0.2 0.3 count


def kept(share: float, entropies: Tensor = ENTROPIES, mask: Tensor = MASK) -> list[float]:
    return sorted(round(value, 3) for value in entropies[top_entropy_mask(entropies, mask, share=share)].tolist())


def test_by_hand():
    # Six count: ⌊5ρ⌋ + 1 of them are kept.
    assert kept(0.19) == [0.9]
    assert kept(0.2) == [0.7, 0.9]
    assert kept(0.5) == [0.4, 0.7, 0.9]
    assert kept(0.99) == [0.2, 0.3, 0.4, 0.7, 0.9]
    found = top_entropy_mask(ENTROPIES, MASK, share=0.2)
    assert found.dtype == torch.bool
    assert found.tolist() == [[False, True, False, False], [True, False, False, False]]


def test_one_keeps_all_and_zero_none():
    assert torch.equal(top_entropy_mask(ENTROPIES, MASK, share=1), MASK)
    assert not top_entropy_mask(ENTROPIES, MASK, share=0).any()


def test_no_token_is_lost_to_rounding():
    """⌊ρ(n − 1)⌋ + 1 with ρ as written: 0.29 · 100 is 29, whatever floats make of it."""
    assert 0.29 * 100 < 29
    for count in (2, 11, 101, 1001):
        entropies = torch.arange(1.0, count + 1)[None]
        everything = torch.ones_like(entropies, dtype=torch.bool)
        for hundredths in range(1, 101):
            found = top_entropy_mask(entropies, everything, share=hundredths / 100).sum().item()
            assert found == hundredths * (count - 1) // 100 + 1


def test_ties_are_kept_together():
    entropies = torch.tensor([[0.5, 0.2, 0.5, 0.5, 0.1]])
    mask = torch.ones_like(entropies, dtype=torch.bool)
    assert kept(0.01, entropies, mask) == [0.5, 0.5, 0.5]
    assert kept(0.8, entropies, mask) == [0.2, 0.5, 0.5, 0.5]
    assert torch.equal(
        top_entropy_mask(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), share=0.3).sum(), torch.tensor(6)
    )


def test_nothing_and_a_single_token():
    assert not top_entropy_mask(ENTROPIES, torch.zeros_like(MASK), share=0.5).any()
    assert top_entropy_mask(ENTROPIES[:0], MASK[:0], share=0.5).shape == (0, 4)
    one = torch.zeros_like(MASK)
    one[1, 2] = True
    assert torch.equal(top_entropy_mask(ENTROPIES, one, share=1e-9), one)


def test_masked_positions_may_hold_anything():
    expected = top_entropy_mask(ENTROPIES, MASK, share=0.5)
    for value in (math.nan, math.inf, -math.inf):
        assert torch.equal(top_entropy_mask(ENTROPIES.masked_fill(~MASK, value), MASK, share=0.5), expected)


def test_half_precision_and_no_gradient():
    entropies = ENTROPIES.bfloat16().requires_grad_()
    found = top_entropy_mask(entropies, MASK, share=0.5)
    assert torch.equal(found, top_entropy_mask(ENTROPIES, MASK, share=0.5))
    assert not found.requires_grad


def test_a_part_of_the_batch_would_keep_other_tokens():
    shifted = ENTROPIES + torch.tensor([[1.0], [0.0]])
    parts = torch.cat([top_entropy_mask(shifted[i : i + 1], MASK[i : i + 1], share=0.2) for i in (0, 1)])
    assert not torch.equal(top_entropy_mask(shifted, MASK, share=0.2), parts)


@given(st.data())
@settings(max_examples=60)
def test_keeps_what_is_at_or_above_the_quantile_in_any_order(data):
    count = data.draw(st.integers(1, 25))
    values = data.draw(st.lists(st.floats(0, 10, width=32), min_size=count, max_size=count))
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=count, max_size=count))])
    share = data.draw(st.sampled_from([0.03, 0.125, 0.25, 0.5, 0.77, 0.9375]))
    entropies = torch.tensor([values])
    found = top_entropy_mask(entropies, mask, share=share)
    assert not (found & ~mask).any()
    counted = np.array([value for value, counts in zip(values, mask[0].tolist(), strict=True) if counts])
    if len(counted):
        # The next order statistic above the interpolated quantile, so that rounding in the interpolation has no say.
        threshold = np.quantile(counted, 1 - share, method="higher")
        assert torch.equal(found, mask & (entropies >= float(threshold)))
        assert found.sum() >= math.floor(share * (len(counted) - 1)) + 1
    order = torch.tensor(data.draw(st.permutations(range(count))))
    assert torch.equal(top_entropy_mask(entropies[:, order], mask[:, order], share=share), found[:, order])


def test_bad_input_is_named():
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"share is {share}"):
            top_entropy_mask(ENTROPIES, MASK, share=share)
    with pytest.raises(ValueError, match="boolean mask"):
        top_entropy_mask(ENTROPIES, MASK.long(), share=0.5)
    with pytest.raises(ValueError, match="expected one shape"):
        top_entropy_mask(ENTROPIES[:, :2], MASK, share=0.5)
    with pytest.raises(ValueError, match="1 of 6 entropies are NaN"):
        top_entropy_mask(ENTROPIES.masked_fill(ENTROPIES == 0.4, math.nan), MASK, share=0.5)
