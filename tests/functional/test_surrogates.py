"""The clipped surrogate: each side of each bound by hand, and its gradient."""

import math

import pytest
import torch

from taurl.functional.surrogates import clip_indicators, clipped_surrogate

BOUNDS = {"clip_low": 0.2, "clip_high": 0.3}
#         ratio, A,    loss,  d loss / d ratio, low,   high
CASES = [
    (1.0, 2.0, -2.0, -2.0, False, False),
    (1.0, -2.0, 2.0, 2.0, False, False),
    (1.5, 2.0, -2.6, 0.0, False, True),  # good and already much likelier: no reason to go on
    (1.5, -2.0, 3.0, 2.0, False, False),  # bad and likelier: must come down
    (0.5, 2.0, -1.0, -2.0, False, False),  # good and less likely: must come up
    (0.5, -2.0, 1.6, 0.0, True, False),  # bad and already much less likely
    (1.25, 2.0, -2.5, -2.0, False, False),  # between 1 + ε_low and 1 + ε_high
    (5.0, 0.0, 0.0, 0.0, False, False),
]


def test_every_side_of_every_bound():
    ratio, advantage, loss, slope, low, high = (list(column) for column in zip(*CASES, strict=True))
    ratios = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    result = clipped_surrogate(ratios, advantages, **BOUNDS)
    assert result[0].tolist() == pytest.approx(loss, rel=1e-14)
    result.sum().backward()
    assert ratios.grad[0].tolist() == pytest.approx(slope, rel=1e-14)
    indicators = clip_indicators(ratios, advantages, **BOUNDS)
    assert [indicator[0].tolist() for indicator in indicators] == [low, high]


def test_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(2)
    ratios = (0.4 + 1.4 * torch.rand(4, 6, dtype=torch.float64, generator=generator)).requires_grad_()
    advantages = torch.randn(4, 1, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, advantages, **BOUNDS), ratios)


def test_flat_exactly_where_the_indicators_say():
    generator = torch.Generator().manual_seed(3)
    ratios = (2 * torch.rand(20, 30, generator=generator)).requires_grad_()
    advantages = torch.randn(20, 30, generator=generator)
    clipped_surrogate(ratios, advantages, **BOUNDS).sum().backward()
    low, high = clip_indicators(ratios, advantages, **BOUNDS)
    assert low.any()
    assert high.any()
    assert torch.equal(ratios.grad == 0, low | high)


def test_one_advantage_per_sequence_and_no_clip():
    ratios = torch.tensor([[0.1, 9.0], [0.1, 9.0]])
    advantages = torch.tensor([[1.0], [-1.0]])
    result = clipped_surrogate(ratios, advantages, clip_low=math.inf, clip_high=math.inf)
    assert torch.equal(result, -ratios * advantages)


def test_bad_input_is_named():
    square = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"advantages \[3\]"):  # would broadcast along the wrong axis
        clipped_surrogate(square, torch.ones(3), **BOUNDS)
    with pytest.raises(ValueError, match=r"clip_low is -0\.1"):
        clip_indicators(square, square, clip_low=-0.1, clip_high=0.2)
