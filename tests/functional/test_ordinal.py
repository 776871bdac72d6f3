"""The proportional odds model against sums of probabilities."""

import math

import pytest
import torch

from taurl.functional.preference import classification_loss, ordinal_loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("classes", "spacing"), [(2, 1.0), (3, 1.0), (5, 0.5), (4, 2.0)])
def test_probabilities_of_the_classes_by_their_definition(classes, spacing):
    thresholds = [spacing * (k - (classes - 2) / 2) for k in range(classes - 1)]
    assert sum(thresholds) == pytest.approx(0)
    for reward in (-3.0, -0.4, 0.0, 2.5):
        exceeding = [1.0, *(sigmoid(reward - threshold) for threshold in thresholds), 0.0]
        expected = [exceeding[k] - exceeding[k + 1] for k in range(classes)]
        rewards = torch.full((classes,), reward, dtype=torch.float64)
        losses = ordinal_loss(rewards, torch.arange(classes), classes=classes, spacing=spacing)
        assert (-losses).exp().tolist() == pytest.approx(expected, rel=1e-12)
        assert float((-losses).exp().sum()) == pytest.approx(1, rel=1e-12)


def test_two_classes_are_labels():
    rewards = torch.tensor([-2.0, 0.3, 5.0], dtype=torch.float64)
    for label in (0, 1):
        labels = torch.full((3,), float(label), dtype=torch.float64)
        torch.testing.assert_close(ordinal_loss(rewards, labels, classes=2), classification_loss(rewards, labels))


def test_gradient_equals_finite_differences_and_stays_finite_far_out():
    rewards = torch.tensor([-1.5, 0.2, 0.9, 4.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda x: ordinal_loss(x, labels, classes=4), rewards)
    far = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    losses = ordinal_loss(far, labels, classes=4)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0.0, 3.0], {"classes": 3}, "labels run from 0.0 to 3.0, expected whole numbers below 3"),
        ([0.0, 0.5], {"classes": 3}, "expected whole numbers"),
        ([0.0, 1.0], {"classes": 1}, "classes is 1, expected at least 2"),
        ([0.0, 1.0], {"classes": 2, "spacing": 0.0}, "spacing is 0.0"),
        ([0.0], {"classes": 2}, "expected one shape"),
    ],
)
def test_bad_input_is_named(labels, options, message):
    with pytest.raises(ValueError, match=message):
        ordinal_loss(torch.zeros(2), torch.tensor(labels), **options)
