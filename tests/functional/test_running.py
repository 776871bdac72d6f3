"""Running moments: exactly those of the whole stream, however it comes."""

import numpy as np
import pytest
import torch

from taurl.functional.running import no_moments, normalized, updated_moments


def stream(seed=0, shift=1e4):
    """Far from 0 with a small deviation, where E[x²] − E[x]² has no digit left in float32."""
    return torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(
    "sizes", [[60], [1] * 60, [7, 0, 13, 40], [59, 1]], ids=["whole", "one by one", "parts", "rest"]
)
def test_moments_of_parts_are_those_of_the_whole(sizes):
    values, moments = stream(), no_moments(3)
    for part in torch.split(values, sizes):
        moments = updated_moments(moments, part)
    np.testing.assert_allclose(moments.mean, values.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.variance, values.numpy().var(0), rtol=1e-9)
    assert float(moments.samples) == 60


def test_single_numbers_and_float32_batches():
    moments = no_moments()
    for part in torch.split(stream()[:, 0].float(), 10):
        moments = updated_moments(moments, part)
    assert moments.mean.dtype == torch.float64
    np.testing.assert_allclose(moments.variance, stream()[:, 0].float().double().numpy().var(), rtol=1e-9)


def test_the_state_given_is_left_alone():
    before = updated_moments(no_moments(3), stream())
    kept = [part.clone() for part in before]
    updated_moments(before, stream(1))
    assert all(torch.equal(one, other) for one, other in zip(before, kept, strict=True))


def test_nothing_seen_leaves_what_is_normalized_as_it_is():
    values = torch.tensor([1.0, -3.0, 9.5])
    torch.testing.assert_close(normalized(values, no_moments(3)), values)
    moments = updated_moments(no_moments(3), torch.empty(0, 3))
    assert all(torch.equal(one, other) for one, other in zip(moments, no_moments(3), strict=True))


def test_normalized_by_hand():
    moments = updated_moments(no_moments(1), torch.tensor([[1.0], [3.0]]))  # mean 2, variance 1
    found = normalized(torch.tensor([[2.0], [3.0], [50.0], [-50.0]]), moments, bound=4.0, epsilon=0.0)
    assert found.flatten().tolist() == [0.0, 1.0, 4.0, -4.0]
    assert found.dtype == torch.float32


def test_a_constant_is_finite():
    moments = updated_moments(no_moments(1), torch.full((5, 1), 7.0))
    assert float(moments.variance) == 0
    assert float(normalized(torch.tensor([7.0]), moments)) == 0


def test_batches_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"batch is \[5, 2\], expected \[n, 3\]"):
        updated_moments(no_moments(3), torch.zeros(5, 2))
    for wrong in (torch.zeros(3, 1), torch.zeros(())):  # which would broadcast
        with pytest.raises(ValueError, match=r"values are .*, expected \[\.\., 3\]"):
            normalized(wrong, no_moments(3))
