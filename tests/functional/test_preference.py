"""Losses of reward models against probabilities worked out by loops and enumeration."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taurl.functional.preference import classification_loss, pairwise_loss, plackett_luce_loss, regression_loss

NAN = math.nan
rewards_of = st.floats(-20, 20)


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_pairwise_by_hand():
    # σ(log 3) = 3/4 and σ(log 3 − log 3) = 1/2; (2 + 2 − log 3)² · 0.1
    chosen, rejected = double(2.0, 2.0), double(2 - math.log(3), 2 - math.log(3))
    plain = pairwise_loss(chosen, rejected)
    assert plain.tolist() == pytest.approx([math.log(4 / 3)] * 2, rel=1e-14)
    with_margin = pairwise_loss(chosen, rejected, margins=double(0.0, math.log(3)))
    assert with_margin.tolist() == pytest.approx([math.log(4 / 3), math.log(2)], rel=1e-14)
    centered = pairwise_loss(chosen, rejected, centering=0.1)
    assert centered.tolist() == pytest.approx([math.log(4 / 3) + 0.1 * (4 - math.log(3)) ** 2] * 2, rel=1e-14)


@given(rewards_of, rewards_of)
def test_pairwise_is_the_probability_of_the_winner(chosen, rejected):
    shift = max(chosen, rejected)
    strengths = math.exp(chosen - shift), math.exp(rejected - shift)
    expected = -math.log(strengths[0] / sum(strengths))
    assert pairwise_loss(double(chosen), double(rejected)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(rewards_of, rewards_of)
def test_expected_gradient_vanishes_when_labels_follow_bradley_terry(first, second):
    rewards = double(first, second).requires_grad_()
    p = 1 / (1 + math.exp(second - first))
    loss = p * pairwise_loss(rewards[:1], rewards[1:]) + (1 - p) * pairwise_loss(rewards[1:], rewards[:1])
    (gradient,) = torch.autograd.grad(loss.sum(), rewards)
    assert gradient.abs().max().item() < 1e-12


def test_centering_settles_the_mean_of_the_two_and_leaves_the_difference():
    chosen, rejected = double(3.0).requires_grad_(), double(1.0).requires_grad_()
    gradients = torch.autograd.grad(pairwise_loss(chosen, rejected, centering=0.01).sum(), (chosen, rejected))
    sigma = 1 / (1 + math.exp(2.0))
    assert (gradients[0] + gradients[1]).item() == pytest.approx(2 * 0.01 * 2 * 4, rel=1e-12)
    assert (gradients[0] - gradients[1]).item() == pytest.approx(-2 * sigma, rel=1e-12)


def test_regression_by_hand():
    rewards, targets = double(1.0, 0.0, -3.0), double(0.5, 0.0, 1.0)
    assert regression_loss(rewards, targets).tolist() == [0.125, 0.0, 8.0]
    assert regression_loss(rewards, targets, huber_threshold=1.0).tolist() == [0.125, 0.0, 3.5]
    assert regression_loss(rewards, targets, huber_threshold=2.0).tolist() == [0.125, 0.0, 6.0]


def test_huber_pulls_with_a_bounded_force():
    rewards = double(-1e30, -0.5, 0.2, 1e30).requires_grad_()
    loss = regression_loss(rewards, torch.zeros(4), huber_threshold=2.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert rewards.grad.tolist() == [-2.0, -0.5, 0.2, 2.0]


def test_the_best_constant_is_the_mean_or_the_log_odds():
    targets = double(1.0, 0.0, 1.0, 1.0)
    score = double(targets.mean().item()).requires_grad_()
    regression_loss(score.expand(4), targets).sum().backward()
    assert abs(score.grad.item()) < 1e-14
    logit = double(math.log(3)).requires_grad_()
    classification_loss(logit.expand(4), targets).sum().backward()
    assert abs(logit.grad.item()) < 1e-14


def test_classification_by_hand():
    logits = double(math.log(3), math.log(3), 0.0)
    assert classification_loss(logits, double(1.0, 0.0, 0.25)).tolist() == pytest.approx(
        [math.log(4 / 3), math.log(4), math.log(2)], rel=1e-14
    )
    booleans = classification_loss(logits[:2], torch.tensor([True, False]))
    assert booleans.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], rel=1e-14)


def ranking_probability(rewards: list[float]) -> float:
    """Draw without replacement, in proportion to e^r: the chance of this very order."""
    strengths = [math.exp(reward) for reward in rewards]
    return math.prod(strengths[k] / sum(strengths[k:]) for k in range(len(strengths)))


def test_plackett_luce_by_hand():
    # strengths 3, 2, 1: 3/6 · 2/3 · 1 = 1/3
    rewards = double(3.0, 2.0, 1.0).log()[None]
    assert plackett_luce_loss(rewards).item() == pytest.approx(math.log(3), rel=1e-14)


@settings(max_examples=25)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=4))
def test_plackett_luce_probabilities_sum_to_one_over_orders(rewards):
    orders = torch.tensor(list(permutations(rewards)), dtype=torch.float64)
    probabilities = (-plackett_luce_loss(orders)).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, rel=1e-12)
    for order, probability in zip(orders.tolist(), probabilities.tolist(), strict=True):
        assert probability == pytest.approx(ranking_probability(order), rel=1e-12)


def test_a_list_of_two_is_a_pair():
    rewards = random(6, 2)
    pairs = pairwise_loss(rewards[:, 0], rewards[:, 1])
    torch.testing.assert_close(plackett_luce_loss(rewards), pairs, rtol=1e-13, atol=0)
    padded = torch.stack([rewards[:, 0], torch.full((6,), NAN).double(), rewards[:, 1]], 1)
    mask = torch.tensor([[True, False, True]]).expand(6, 3)
    torch.testing.assert_close(plackett_luce_loss(padded, mask), pairs, rtol=1e-13, atol=0)


def test_plackett_luce_mask():
    rewards = random(5, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    spoiled = rewards.masked_fill(~mask, NAN)
    spoiled[1, 3] = math.inf
    spoiled.requires_grad_()
    loss = plackett_luce_loss(spoiled, mask)
    for row in range(5):
        kept = [rewards[row, k].item() for k in range(4) if mask[row, k]]
        assert loss[row].item() == pytest.approx(-math.log(ranking_probability(kept)), rel=1e-12, abs=1e-15)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        plackett_luce_loss(spoiled, mask).sum().backward()
    assert spoiled.grad.isfinite().all()
    assert (spoiled.grad[~mask] == 0).all()
    assert (spoiled.grad[:3][mask[:3]] != 0).all()
    assert (spoiled.grad[3:] == 0).all()  # a list of one or none says nothing


def test_gradients_equal_finite_differences():
    first, second = random(5, seed=1).requires_grad_(), random(5, seed=2).requires_grad_()
    margins, labels = random(5, seed=3).abs(), random(5, seed=4).sigmoid()
    check = torch.autograd.gradcheck
    assert check(lambda x, y: pairwise_loss(x, y, margins=margins, centering=0.3), (first, second))
    assert check(lambda x: regression_loss(x, labels), first)
    assert check(lambda x: regression_loss(x, labels, huber_threshold=0.5), first)
    assert check(lambda x: classification_loss(x, labels), first)
    lists = random(3, 4, seed=5).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1]]).bool()
    assert check(lambda x: plackett_luce_loss(x, mask), lists)


def test_margins_targets_and_labels_are_constants():
    rewards, constants = random(4, seed=6).requires_grad_(), random(4, seed=7).sigmoid().requires_grad_()
    for loss in (
        pairwise_loss(rewards, -rewards, margins=constants),
        regression_loss(rewards, constants),
        regression_loss(rewards, constants, huber_threshold=0.1),
        classification_loss(rewards, constants),
    ):
        of_rewards, of_constants = torch.autograd.grad(loss.sum(), (rewards, constants), allow_unused=True)
        assert of_rewards.any()
        assert of_constants is None


def test_the_huber_loss_without_a_threshold_is_the_limit_of_large_ones():
    rewards, targets = random(9, seed=8), random(9, seed=9)
    expected = [(f - y) ** 2 / 2 for f, y in zip(rewards.tolist(), targets.tolist(), strict=True)]
    assert regression_loss(rewards, targets).tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.equal(regression_loss(rewards, targets, huber_threshold=1e6), regression_loss(rewards, targets))


def test_far_apart_rewards_stay_finite():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    zeros = torch.zeros(2)
    for loss in (
        pairwise_loss(far, zeros),
        classification_loss(far, zeros),
        plackett_luce_loss(torch.stack([far, zeros], 1)),
    ):
        assert loss.isfinite().all()
        assert sorted(loss.tolist()) == [0.0, 1e4]
        (gradient,) = torch.autograd.grad(loss.sum(), far)
        assert gradient.isfinite().all()


def test_half_precision_is_widened_and_double_kept():
    half = torch.tensor([1.0, 2.0]).bfloat16()
    small = torch.tensor([1e-3, 1e-3]).bfloat16()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        assert pairwise_loss(half.to(dtype), small.to(dtype), margins=half.to(dtype)).dtype == expected
        assert regression_loss(half.to(dtype), small.double()).dtype == expected
        assert classification_loss(half.to(dtype), small).dtype == expected
        assert plackett_luce_loss(half.to(dtype)[None]).dtype == expected
    # 1 − 2⁻¹⁰ rounds to 1 in bfloat16
    difference = pairwise_loss(half[:1], small[:1]).item()
    assert difference == pytest.approx(math.log1p(math.exp(small[0].item() - 1)), rel=1e-6)
    assert pairwise_loss(half.double(), small.double()).dtype == torch.float64


def test_empty_batches():
    nothing = torch.zeros(0)
    assert pairwise_loss(nothing, nothing).shape == (0,)
    assert plackett_luce_loss(torch.zeros(0, 3)).shape == (0,)
    assert plackett_luce_loss(torch.zeros(2, 0)).tolist() == [0.0, 0.0]


def test_bad_input_is_named():
    rows = torch.zeros(3)
    with pytest.raises(ValueError, match=r"chosen_rewards \[3\], rejected_rewards \[1\]"):
        pairwise_loss(rows, torch.zeros(1))
    with pytest.raises(ValueError, match=r"rewards has shape \[3, 1\]"):
        regression_loss(torch.zeros(3, 1), rows)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        pairwise_loss(rows.long(), rows.long())
    with pytest.raises(ValueError, match=r"margins \[2\]"):
        pairwise_loss(rows, rows, margins=torch.zeros(2))
    with pytest.raises(ValueError, match="centering is -1"):
        pairwise_loss(rows, rows, centering=-1)
    with pytest.raises(ValueError, match="huber_threshold is 0"):
        regression_loss(rows, rows, huber_threshold=0)
    with pytest.raises(ValueError, match=r"labels run from 0\.0 to 2\.0"):
        classification_loss(rows, torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="boolean mask"):
        plackett_luce_loss(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected floats \[N, K\]"):
        plackett_luce_loss(rows)
