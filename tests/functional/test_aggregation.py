"""Token losses to one number, against plain loops; masked rows; what stands where nothing counts."""

import math

import pytest
import torch

from taurl.functional.aggregation import token_weights, weighted_sum

MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
VALUES = torch.tensor([[1, 2, 3, 6], [9, 5, 9, 9], [9, 9, 9, 9], [4, -2, 9, 9]], dtype=torch.float64)
# Rows that count have sums 12, 5, 2 and lengths 4, 1, 2.
BY_HAND = {"token": 19 / 7, "sequence": (12 / 4 + 5 / 1 + 2 / 2) / 3, "constant": 19 / (3 * 10)}


def weights_of(how: str, mask: torch.Tensor = MASK, **options) -> torch.Tensor:
    return token_weights(mask, how, length=10 if how == "constant" else None, dtype=torch.float64, **options)


@pytest.mark.parametrize("how", BY_HAND)
def test_by_hand(how):
    assert weighted_sum(VALUES, weights_of(how)).item() == pytest.approx(BY_HAND[how], rel=1e-14)


@pytest.mark.parametrize("how", BY_HAND)
def test_equals_a_loop(how):
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(9, 13, generator=generator) < 0.4
    values = torch.randn(9, 13, dtype=torch.float64, generator=generator)
    rows = [[values[i, t].item() for t in range(13) if mask[i, t]] for i in range(9)]
    rows = [row for row in rows if row]
    expected = {
        "token": sum(map(sum, rows)) / sum(map(len, rows)),
        "sequence": sum(sum(row) / len(row) for row in rows) / len(rows),
        "constant": sum(map(sum, rows)) / (len(rows) * 10),
    }[how]
    assert weighted_sum(values, weights_of(how, mask)).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("how", BY_HAND)
def test_masked_rows_change_nothing_and_an_empty_batch_is_zero(how):
    without = torch.tensor([0, 1, 3])
    assert torch.equal(weights_of(how)[without], weights_of(how, MASK[without]))
    nothing = weights_of(how, torch.zeros_like(MASK))
    assert not nothing.any()
    assert weighted_sum(VALUES, nothing).item() == 0
    assert weighted_sum(VALUES[:0], weights_of(how, MASK[:0])).item() == 0


@pytest.mark.parametrize("how", BY_HAND)
def test_a_row_that_is_not_forwarded_still_counts(how):
    """Its loss would be 0: leaving it out of the sum gives what forwarding it gives."""
    values = VALUES.clone()
    values[0] = 0
    rest = slice(1, None)
    assert weighted_sum(values[rest], weights_of(how)[rest]) == weighted_sum(values, weights_of(how))


def test_nothing_leaks_from_masked_positions():
    weights = weights_of("sequence")
    spoiled = VALUES.masked_fill(~MASK, math.nan)
    spoiled[2, 0] = math.inf
    spoiled.requires_grad_()
    result = weighted_sum(spoiled, weights)
    assert result.item() == pytest.approx(BY_HAND["sequence"], rel=1e-14)
    result.backward()
    assert torch.equal(spoiled.grad, weights)
    assert not spoiled.grad[~MASK].any()


def test_half_precision_values_are_added_in_float32():
    values = torch.ones(1, 3000, dtype=torch.bfloat16)  # bfloat16 counts to 256
    result = weighted_sum(values, token_weights(torch.ones(1, 3000, dtype=torch.bool), "token"))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(1.0, rel=1e-5)


def test_bad_input_is_named():
    for how, length in [("constant", None), ("constant", 0), ("token", 5)]:
        with pytest.raises(ValueError, match=f"length is {length}"):
            token_weights(MASK, how, length=length)
    with pytest.raises(ValueError, match="how is 'mean'"):
        token_weights(MASK, "mean")
    with pytest.raises(ValueError, match="boolean mask"):
        token_weights(MASK.long(), "token")
    with pytest.raises(ValueError, match="expected one shape"):
        weighted_sum(VALUES, VALUES[:, :1])
