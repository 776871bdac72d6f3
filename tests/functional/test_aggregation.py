"""Token and row losses to one number, against plain loops; masked rows; what stands where nothing counts."""

import math

import pytest
import torch

from taurl.functional.aggregation import row_weights, token_weights, weighted_sum

MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
VALUES = torch.tensor([[1, 2, 3, 6], [9, 5, 9, 9], [9, 9, 9, 9], [4, -2, 9, 9]], dtype=torch.float64)
# Rows that count have sums 12, 5, 2 and lengths 4, 1, 2.
BY_HAND = {"token": 19 / 7, "sequence": (12 / 4 + 5 / 1 + 2 / 2) / 3, "sum": 19 / 3, "constant": 19 / (3 * 10)}


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
        "sum": sum(sum(row) for row in rows) / len(rows),
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


@pytest.mark.parametrize("how", BY_HAND)
def test_gradient_equals_finite_differences(how):
    values = VALUES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: weighted_sum(v.square(), weights_of(how)), values)


@pytest.mark.parametrize("how", BY_HAND)
def test_the_shortest_batch(how):
    one = torch.ones(1, 1, dtype=torch.bool)
    assert weights_of(how, one).item() == pytest.approx({"constant": 0.1}.get(how, 1.0), rel=1e-15)


def test_one_loss_for_each_row():
    counts = torch.tensor([True, False, True, True, False])
    weights = row_weights(counts, dtype=torch.float64)
    values = torch.tensor([2.0, math.nan, -1.0, 5.0, math.inf], dtype=torch.float64, requires_grad=True)
    total = weighted_sum(values, weights)
    assert total.item() == pytest.approx((2 - 1 + 5) / 3, rel=1e-14)
    total.backward()
    third = 1 / 3
    assert values.grad.tolist() == [third, 0, third, third, 0]
    parts = [weighted_sum(v, w).item() for v, w in zip(values.split(2), weights.split(2), strict=True)]
    assert sum(parts) == pytest.approx(total.item(), rel=1e-14)
    assert not row_weights(torch.zeros(3, dtype=torch.bool)).any()
    assert row_weights(counts[:0]).shape == (0,)
    assert row_weights(counts).dtype == torch.float32


def test_one_loss_for_each_sequence_at_each_of_its_tokens():
    """GSPO is then the mean over the rows, LUSPO that mean with each row times its length; Dr. GRPO is a part of it."""
    losses = torch.tensor([2.0, -3.0, 100.0, 7.0], dtype=torch.float64)
    spread = losses[:, None].expand_as(MASK)
    rows = row_weights(MASK.any(1), dtype=torch.float64)
    assert weighted_sum(spread, weights_of("sequence")).item() == pytest.approx(weighted_sum(losses, rows).item())
    lengths = torch.tensor([4, 1, 0, 2])
    assert weighted_sum(spread, weights_of("sum")).item() == pytest.approx(weighted_sum(losses * lengths, rows).item())
    torch.testing.assert_close(weights_of("constant") * 10, weights_of("sum"))


@pytest.mark.parametrize("how", BY_HAND)
def test_which_weights_give_the_policy_gradient(how):
    """All answers of a policy that goes on (1) or stops (0), two tokens at most; E[∇ loss] against −∇ E[r]."""
    logits = torch.tensor([0.4, -0.9], dtype=torch.float64, requires_grad=True)  # of going on at each position
    answers, rewards = [[0], [1, 0], [1, 1]], [1.0, -2.0, 0.5]
    length = 2 if how == "constant" else None
    value, surrogate = 0.0, 0.0
    for answer, reward in zip(answers, rewards, strict=True):
        logprobs = torch.nn.functional.logsigmoid(
            torch.stack([logits[i] if a else -logits[i] for i, a in enumerate(answer)])
        )
        probability = logprobs.sum().exp()
        value = value + probability * reward
        padded = torch.nn.functional.pad(-reward * logprobs, (0, 2 - len(answer)))[None]
        mask = torch.tensor([[True] * len(answer) + [False] * (2 - len(answer))])
        weights = token_weights(mask, how, length=length, dtype=torch.float64)
        surrogate = surrogate + probability.detach() * weighted_sum(padded, weights)
    (exact,) = torch.autograd.grad(-value, logits, retain_graph=True)
    (found,) = torch.autograd.grad(surrogate, logits)
    right = {"sum": 1.0, "constant": 0.5}.get(how)
    if right is None:
        assert abs(found[0] * exact[1] - found[1] * exact[0]) > 1e-3  # another direction
    else:
        torch.testing.assert_close(found, right * exact)


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
    for weights in (
        lambda dtype: token_weights(MASK, "token", dtype=dtype),
        lambda dtype: row_weights(MASK[0], dtype=dtype),
    ):
        with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16"):
            weights(torch.bfloat16)
    for counts in (MASK, MASK[0].long()):
        with pytest.raises(ValueError, match=r"expected booleans \[N\]"):
            row_weights(counts)
    with pytest.raises(ValueError, match="expected one shape"):
        weighted_sum(VALUES, VALUES[:, :1])
