"""Losses of a critic and the variance it explains: by hand, against definitions, and where nothing may be read."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taurl.functional.value_losses import (
    clipped_value_loss,
    explained_variance,
    huber_value_loss,
    squared_value_loss,
)

NAN, INF = math.nan, math.inf
seeds = st.integers(0, 2**32)


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(loss, values: torch.Tensor, *others: torch.Tensor, **options) -> torch.Tensor:
    values = values.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(values, *others, **options).sum(), values)
    return found


def test_losses_by_hand():
    values, targets = double([3, 0, 1, -4]), double([1, 0.5, 1, 0])
    assert squared_value_loss(values, targets).tolist() == [2, 0.125, 0, 8]
    assert huber_value_loss(values, targets).tolist() == [1.5, 0.125, 0, 3.5]
    assert huber_value_loss(values, targets, threshold=3.0).tolist() == [2, 0.125, 0, 7.5]
    assert gradient(huber_value_loss, values, targets).tolist() == [1, -0.5, 0, -1]


#     V   V_old target loss   slope, ε = 1
CLIPPED = [
    (1.5, 1.0, 3.0, 1.125, -1.5),  # moved less than ε
    (2.5, 1.0, 3.0, 0.5, 0.0),  # moved towards the target by more: the clipped 2 counts and is flat
    (-1.0, 1.0, 3.0, 8.0, -4.0),  # strayed away: pulled back
    (6.0, 1.0, 3.0, 4.5, 3.0),  # ran past the target, further than the clipped 2 is from it: pulled back
    (3.5, 1.0, 3.0, 0.5, 0.0),  # ran past it, but nearer than the clipped 2
    (1.0, 1.0, 1.0, 0.0, 0.0),
]


def test_clipped_value_loss_by_hand():
    values, old, targets, loss, slope = (double(numbers) for numbers in zip(*CLIPPED, strict=True))
    assert clipped_value_loss(values, old, targets, clip=1.0).tolist() == loss.tolist()
    assert gradient(clipped_value_loss, values, old, targets, clip=1.0).tolist() == slope.tolist()
    assert torch.equal(clipped_value_loss(values, old, targets, clip=INF), squared_value_loss(values, targets))
    assert torch.equal(gradient(clipped_value_loss, values, old, targets, clip=INF), values - targets)


@settings(max_examples=50)
@given(seeds, st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(1, 20))
def test_what_the_losses_promise(seed, bound, count):
    values, old, targets = 2 * normal(seed, 3, count)
    squared = squared_value_loss(values, targets)
    torch.testing.assert_close(gradient(squared_value_loss, values, targets), values - targets)
    clipped = clipped_value_loss(values, old, targets, clip=bound)
    assert (clipped >= squared).all()
    # At the values that the data was sampled with, clipping does nothing.
    torch.testing.assert_close(clipped_value_loss(old, old, targets, clip=bound), squared_value_loss(old, targets))
    for v, o, t, loss in zip(*(x.tolist() for x in (values, old, targets, clipped)), strict=True):
        near = o + max(-bound, min(bound, v - o))
        assert loss == pytest.approx(max((v - t) ** 2, (near - t) ** 2) / 2, rel=1e-12, abs=1e-12)
    if bound > 0:
        huber = huber_value_loss(values, targets, threshold=bound)
        assert (huber <= squared).all()
        found = gradient(huber_value_loss, values, targets, threshold=bound)
        torch.testing.assert_close(found, (values - targets).clamp(-bound, bound))
        expected = torch.nn.functional.huber_loss(values, targets, delta=bound, reduction="none")
        torch.testing.assert_close(huber, expected)


def test_gradients_equal_finite_differences():
    values, old, targets = normal(3, 3, 8)
    leaf = values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: squared_value_loss(v, targets), leaf)
    assert torch.autograd.gradcheck(lambda v: huber_value_loss(v, targets, threshold=0.7), leaf)
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, targets, clip=0.4), leaf)


def test_only_the_values_learn_and_half_precision_is_widened():
    values, old, targets = normal(4, 3, 6).bfloat16().unbind()
    old.requires_grad_()
    targets = targets.clone().requires_grad_()
    for loss in (
        squared_value_loss(values, targets),
        huber_value_loss(values, targets),
        clipped_value_loss(values, old, targets, clip=0.1),
    ):
        assert loss.dtype == torch.float32
        assert not loss.requires_grad


def test_huber_keeps_large_errors_finite():
    values = torch.tensor([1e30, -3e38]).requires_grad_()
    loss = huber_value_loss(values, torch.zeros(2))
    assert loss.isfinite().all()
    loss.sum().backward()
    assert values.grad.tolist() == [1, -1]


# Explained variance


def test_explained_variance():
    targets = double([1, 2, 3, 6])
    assert explained_variance(targets, targets).item() == 1
    assert explained_variance(targets - 100, targets).item() == 1
    assert explained_variance(torch.full_like(targets, 5), targets).item() == 0
    values = [0.5, 3.0, 2.0, 4.0]
    residuals = [t - v for t, v in zip(targets.tolist(), values, strict=True)]
    expected = 1 - statistics.pvariance(residuals) / statistics.pvariance(targets.tolist())
    assert explained_variance(double(values), targets).item() == pytest.approx(expected, rel=1e-14)
    assert explained_variance(-targets, targets).item() == pytest.approx(-3)
    assert explained_variance(targets.float()[None], targets.float()[None]).dtype == torch.float32


def test_explained_variance_counts_what_the_mask_keeps():
    values, targets = double([[1, NAN, 3], [INF, 2, 9]]), double([[2, NAN, 3], [1, 5, INF]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    found = explained_variance(values.requires_grad_(), targets, mask)
    assert found.item() == pytest.approx(explained_variance(double([1, 3, 2]), double([2, 3, 5])).item())
    assert not found.requires_grad


def test_explained_variance_of_what_does_not_vary_is_nan():
    constant = torch.full((3,), 0.1, dtype=torch.float64)
    assert constant.var(correction=0) != 0  # by rounding
    mask = torch.tensor([True, False, False])
    for values, targets, kept in [
        (constant + 1, constant, None),
        (constant, double([1, 2, 3]), mask),
        (constant, constant, ~mask & mask),
        (constant[:0], constant[:0], None),
    ]:
        assert explained_variance(values, targets, kept).isnan()
    large = torch.tensor([1e30, -1e30, 0.0])
    assert explained_variance(large / 2, large).item() == 0.75  # squares overflow float32


def test_bad_input_is_named():
    three, square, flags = torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"values \[3\], targets \[3, 3\]"):
        squared_value_loss(three, square)
    for threshold in (0.0, NAN):
        with pytest.raises(ValueError, match="threshold is"):
            huber_value_loss(three, three, threshold=threshold)
    with pytest.raises(ValueError, match=r"clip is -0\.1"):
        clipped_value_loss(three, three, three, clip=-0.1)
    with pytest.raises(ValueError, match=r"old_values \[3, 3\]"):
        clipped_value_loss(three, square, three, clip=0.1)
    with pytest.raises(ValueError, match=r"mask \[2\]"):
        explained_variance(three, three, flags[:2])
    with pytest.raises(ValueError, match=r"mask is torch\.float32"):
        explained_variance(three, three, three)
