"""KTO: the value of single answers by hand, its gradient, and its baseline over the whole batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taurl.functional.direct_preference import apo_zero_loss
from taurl.functional.kto import kl_baseline, kto_loss


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_by_hand():
    # β(h − z₀) = 2 · (log 3 / 2 + 1 − 1) = log 3
    logprobs, reference = double(-4 + math.log(3) / 2, -4 + math.log(3) / 2), double(-5.0, -5.0)
    loss = kto_loss(
        logprobs,
        reference,
        torch.tensor([True, False]),
        kl_baseline=1.0,
        beta=2.0,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    assert loss.tolist() == pytest.approx([1.5 / 4, 0.5 * 3 / 4], rel=1e-13)


def test_baseline():
    assert kl_baseline(double(-1.0, -2.0, -3.0), double(-2.0, -2.0, -5.0)) == pytest.approx(1.0)
    assert kl_baseline(double(-5.0), double(-2.0)) == 0.0
    assert kl_baseline(torch.zeros(0), torch.zeros(0)) == 0.0
    unknown = kl_baseline(double(math.nan, 1.0), double(0.0, 0.0))
    assert math.isnan(unknown)
    losses = kto_loss(double(0.0, 1.0), double(0.0, 0.0), torch.tensor([True, False]), kl_baseline=unknown)
    assert losses.isnan().all()  # of which no update is taken
    with_gradient = kl_baseline(torch.zeros(1, requires_grad=True), torch.tensor([-1.0]))
    assert with_gradient == 1.0


@given(st.floats(-30, 30), st.floats(0, 5), st.floats(0.05, 1))
def test_liked_answers_are_pushed_up_and_disliked_down_hardest_at_the_baseline(log_ratio, baseline, beta):
    logprobs = double(log_ratio - 40, log_ratio - 40).requires_grad_()
    reference = double(-40.0, -40.0)
    loss = kto_loss(logprobs, reference, torch.tensor([True, False]), kl_baseline=baseline, beta=beta)
    assert loss.sum().item() == pytest.approx(1.0)  # what one gains the other loses
    (liked,) = torch.autograd.grad(loss[0], logprobs, retain_graph=True)
    (disliked,) = torch.autograd.grad(loss[1], logprobs)
    assert liked[0].item() < 0 < disliked[1].item()
    assert liked[1].item() == disliked[0].item() == 0
    # β · σ · (1 − σ), at most β/4
    odds = math.exp(-beta * (log_ratio - baseline))
    assert disliked[1].item() == pytest.approx(beta * odds / (1 + odds) ** 2, rel=1e-9)
    assert disliked[1].item() <= beta / 4 + 1e-12


def test_without_a_baseline_it_is_apo_zero_taken_apart():
    log_ratios = double(0.5, -1.0, 2.0)
    zeros = torch.zeros(3).double()
    liked = kto_loss(log_ratios, zeros, torch.ones(3).bool(), kl_baseline=0.0, beta=0.3)
    disliked = kto_loss(log_ratios.flip(0), zeros, torch.zeros(3).bool(), kl_baseline=0.0, beta=0.3)
    torch.testing.assert_close(liked + disliked, apo_zero_loss(log_ratios, log_ratios.flip(0), beta=0.3))


def test_gradient_parts_and_far_apart():
    generator = torch.Generator().manual_seed(5)
    logprobs, reference = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    desirable = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    options = {"kl_baseline": kl_baseline(logprobs, reference), "undesirable_weight": 1.3}
    leaf = logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, reference, desirable, **options), leaf)
    whole = kto_loss(logprobs, reference, desirable, **options)
    parts = [kto_loss(logprobs[r], reference[r], desirable[r], **options) for r in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), whole)
    far = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = kto_loss(far, torch.zeros(4), torch.tensor([1, 1, 0, 0]).bool(), kl_baseline=0.0, beta=1.0)
    assert loss.tolist() == [0.0, 1.0, 1.0, 0.0]
    loss.sum().backward()
    assert far.grad.isfinite().all()
    half = kto_loss(far.bfloat16(), torch.zeros(4).bfloat16(), torch.ones(4).bool(), kl_baseline=0.0)
    assert half.dtype == torch.float32


def test_bad_input_is_named():
    rows, labels = torch.zeros(3), torch.ones(3).bool()
    with pytest.raises(ValueError, match=r"desirable \[2\]"):
        kto_loss(rows, rows, labels[:2], kl_baseline=0.0)
    with pytest.raises(ValueError, match=r"desirable is torch\.float32"):
        kto_loss(rows, rows, labels.float(), kl_baseline=0.0)
    with pytest.raises(ValueError, match="kl_baseline is -1"):
        kto_loss(rows, rows, labels, kl_baseline=-1)
    with pytest.raises(ValueError, match="weights are -1 and 1"):
        kto_loss(rows, rows, labels, kl_baseline=0, desirable_weight=-1)
    with pytest.raises(ValueError, match="beta is 0"):
        kto_loss(rows, rows, labels, kl_baseline=0, beta=0)
    with pytest.raises(ValueError, match="reference_logprobs"):
        kl_baseline(rows, rows[:1])
