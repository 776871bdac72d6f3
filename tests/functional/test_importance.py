"""Importance ratios and weights against plain loops."""

import math

import pytest
import torch

from taurl.functional.importance import effective_sample_size, sequence_ratios, token_ratios, truncated_weights

NAN = math.nan


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logprobs, old = -3 * torch.rand(2, 3, 5, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    return logprobs, old, mask


def test_token_ratios_equal_a_loop():
    logprobs, old, _ = example()
    result = token_ratios(logprobs, old)
    for row in range(3):
        for column in range(5):
            quotient = math.exp(logprobs[row, column].item()) / math.exp(old[row, column].item())
            assert result[row, column].item() == pytest.approx(quotient, rel=1e-14)


def test_first_ratio_is_one_and_carries_the_gradient():
    logprobs = example()[0].requires_grad_()
    ratios = token_ratios(logprobs, logprobs.detach())
    assert torch.equal(ratios, torch.ones(3, 5, dtype=torch.float64))
    ratios.sum().backward()
    assert torch.equal(logprobs.grad, torch.ones(3, 5, dtype=torch.float64))


def test_sequence_ratios_are_geometric_means():
    logprobs, old, mask = example()
    result = sequence_ratios(logprobs, old, mask)
    assert result.shape == (3, 5)
    for row in range(3):
        tokens = [math.exp((logprobs - old)[row, t].item()) for t in range(5) if mask[row, t]]
        expected = math.prod(tokens) ** (1 / len(tokens)) if tokens else 1.0
        assert result[row].tolist() == pytest.approx([expected] * 5, rel=1e-14)


def test_sequence_ratio_gradient_and_what_is_masked():
    logprobs, old, mask = example()
    assert torch.autograd.gradcheck(lambda x: sequence_ratios(x, old, mask), logprobs.clone().requires_grad_())
    spoiled = logprobs.masked_fill(~mask, NAN).requires_grad_()
    ratios = sequence_ratios(spoiled, old, mask)
    assert torch.equal(ratios, sequence_ratios(logprobs, old, mask))
    ratios.sum().backward()
    assert torch.equal(spoiled.grad != 0, mask)
    assert spoiled.grad.isfinite().all()


def test_huge_and_tiny_ratios_stay_finite():
    logprobs = torch.tensor([[0.0, -1e4, -80.0]], requires_grad=True)
    old = torch.tensor([[-1e4, 0.0, 0.0]])
    ratios = token_ratios(logprobs, old)
    assert ratios.isfinite().all()
    assert ratios[0, 0] > 1e25
    assert ratios[0, 1] == 0
    ratios.sum().backward()
    assert logprobs.grad.isfinite().all()
    assert token_ratios(old.bfloat16(), old.bfloat16()).dtype == torch.float32


def test_truncated_weights():
    logprobs = torch.tensor([[0.5, 0.2, 0.4]], dtype=torch.float64).log().requires_grad_()
    sampler = torch.tensor([[0.1, 0.4, 0.4]], dtype=torch.float64).log()
    weights = truncated_weights(logprobs, sampler, 2.0)
    assert weights.tolist()[0] == pytest.approx([2.0, 0.5, 1.0], rel=1e-15)
    assert not weights.requires_grad
    assert truncated_weights(logprobs, sampler, math.inf)[0, 0].item() == pytest.approx(5.0, rel=1e-15)
    with pytest.raises(ValueError, match="cap is 0"):
        truncated_weights(logprobs, sampler, 0)


def test_effective_sample_size():
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert effective_sample_size(torch.tensor([[3.0, 3.0, NAN], [3.0, 3.0, NAN]]), mask).item() == 4
    assert effective_sample_size(torch.tensor([[5.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), mask).item() == 1
    # (1 + 2 + 3 + 4)² / (1 + 4 + 9 + 16) = 100 / 30
    counting = torch.tensor([[1.0, 2.0, math.inf], [3.0, 4.0, 9.0]])
    assert effective_sample_size(counting, mask).item() == pytest.approx(10 / 3, rel=1e-6)
    assert effective_sample_size(counting * 1e30, mask).item() == pytest.approx(10 / 3, rel=1e-6)
    assert effective_sample_size(counting * 1e-30, mask).item() == pytest.approx(10 / 3, rel=1e-6)
    assert effective_sample_size(counting, torch.zeros_like(mask)).item() == 0
    assert effective_sample_size(torch.zeros(2, 3), mask).item() == 0
    assert effective_sample_size(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).item() == 0


def test_shapes_do_not_broadcast():
    with pytest.raises(ValueError, match=r"logprobs \[2, 3\], other_logprobs \[2, 1\]"):
        token_ratios(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="boolean mask"):
        sequence_ratios(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
