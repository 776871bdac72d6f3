"""Slopes that are written out, against automatic differentiation of the losses they belong to."""

import numpy as np
import pytest
import torch

from taurl.functional.importance import token_ratios
from taurl.functional.slopes import clipped_surrogate_slope, clipped_value_slope, huber_value_slope
from taurl.functional.surrogates import clipped_surrogate
from taurl.functional.value_losses import clipped_value_loss, huber_value_loss


def numbers(*columns):
    """Random ones, a row each, float64: as tensors, the first with a gradient, and as arrays."""
    torch.manual_seed(0)
    tensors = [scale * torch.randn(1, 400, dtype=torch.float64) for scale in columns]
    arrays = [tensor.numpy().copy() for tensor in tensors]
    return [tensors[0].requires_grad_(), *tensors[1:]], arrays


def test_of_hubers_loss():
    tensors, arrays = numbers(3.0, 1.0)
    (expected,) = torch.autograd.grad(huber_value_loss(*tensors, threshold=1.5).sum(), tensors[0])
    found = huber_value_slope(*arrays, threshold=1.5)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)
    assert (np.abs(found) == 1.5).any()
    assert (np.abs(found) < 1.5).any()
    with pytest.raises(ValueError, match="threshold is 0"):
        huber_value_slope(*arrays, threshold=0.0)


def test_of_the_clipped_value_loss():
    tensors, arrays = numbers(1.0, 1.0, 1.0)
    (expected,) = torch.autograd.grad(clipped_value_loss(*tensors, clip=0.4).sum(), tensors[0])
    found = clipped_value_slope(*arrays, clip=0.4)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)
    assert 0 < (found == 0).mean() < 1
    with pytest.raises(ValueError, match="clip is -1"):
        clipped_value_slope(*arrays, clip=-1.0)


@pytest.mark.parametrize("clip_high", [0.3, float("inf")])
def test_of_the_clipped_surrogate(clip_high):
    tensors, arrays = numbers(0.5, 0.5, 1.0)
    logprobs, old_logprobs, advantages = tensors
    clips = {"clip_low": 0.2, "clip_high": clip_high}
    losses = clipped_surrogate(token_ratios(logprobs, old_logprobs), advantages, **clips)
    (expected,) = torch.autograd.grad(losses.sum(), logprobs)
    ratios = np.exp(arrays[0] - arrays[1])
    found = clipped_surrogate_slope(ratios, arrays[2], **clips)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)
    assert 0 < (found == 0).mean() < 1
    with pytest.raises(ValueError, match="clip_low is -1"):
        clipped_surrogate_slope(ratios, arrays[2], clip_low=-1.0, clip_high=0.2)
    with pytest.raises(ValueError, match=r"ratios \[1, 400\], advantages \[400\]"):
        clipped_surrogate_slope(ratios, arrays[2][0], **clips)
    same = clipped_surrogate_slope(torch.from_numpy(ratios), advantages, **clips)  # of tensors too
    np.testing.assert_array_equal(same.numpy(), found)
