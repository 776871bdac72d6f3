"""CPO, SimPO and ORPO against plain loops of probabilities."""

import math

import pytest
import torch

from taurl.functional.dpo import dpo_loss
from taurl.functional.reference_free import cpo_loss, orpo_loss, simpo_loss

ROWS = 4


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    chosen, rejected = -8 * torch.rand(2, ROWS, dtype=torch.float64, generator=generator) - 0.1
    chosen_lengths, rejected_lengths = torch.randint(1, 6, (2, ROWS), generator=generator)
    return chosen, rejected, chosen_lengths, rejected_lengths


def wins(first: float, second: float) -> float:
    return math.exp(first) / (math.exp(first) + math.exp(second))


def test_by_hand():
    chosen, rejected = torch.tensor([[2 * math.log(0.5)], [4 * math.log(0.2)]], dtype=torch.float64)
    lengths = torch.tensor([2]), torch.tensor([4])
    # p = 1/2 and 1/5 per token: odds 1 and 1/4, odds ratio 4, σ(log 4) = 4/5
    orpo = orpo_loss(chosen, rejected, *lengths, odds_weight=0.3)
    assert orpo.item() == pytest.approx(math.log(2) + 0.3 * math.log(5 / 4), rel=1e-13)
    # (1/2)² against (1/5)² with β = 2, γ = log 5: strengths 1/4 and 5/25
    simpo = simpo_loss(chosen, rejected, *lengths, beta=2.0, target_margin=math.log(5))
    assert simpo.item() == pytest.approx(math.log(0.45 / 0.25), rel=1e-13)
    # (1/2)² against (1/5)⁴ with β = 1/2: 1/2 against 1/25
    cpo = cpo_loss(chosen, rejected, lengths[0], beta=0.5)
    assert cpo.item() == pytest.approx(math.log(0.54 / 0.5) + math.log(2), rel=1e-13)


def test_against_loops():
    chosen, rejected, chosen_lengths, rejected_lengths = batch()
    cpo = cpo_loss(chosen, rejected, chosen_lengths, beta=0.4, likelihood_weight=0.7, label_smoothing=0.1)
    simpo = simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, beta=2.5, target_margin=0.6)
    orpo = orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, odds_weight=0.2)
    for n in range(ROWS):
        w, r = chosen[n].item(), rejected[n].item()
        w_mean, l_mean = w / chosen_lengths[n].item(), r / rejected_lengths[n].item()
        q = wins(0.4 * w, 0.4 * r)
        assert cpo[n].item() == pytest.approx(-0.9 * math.log(q) - 0.1 * math.log(1 - q) - 0.7 * w_mean, rel=1e-11)
        assert simpo[n].item() == pytest.approx(-math.log(wins(2.5 * w_mean - 0.6, 2.5 * l_mean)), rel=1e-11)
        odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (w_mean, l_mean)]
        assert orpo[n].item() == pytest.approx(-w_mean - 0.2 * math.log(odds[0] / sum(odds)), rel=1e-11)


def test_cpo_is_dpo_with_a_uniform_reference():
    chosen, rejected, lengths, _ = batch()
    uniform = torch.full_like(chosen, -3.0)
    dpo = dpo_loss("sigmoid", chosen, rejected, uniform, uniform, beta=0.4)
    torch.testing.assert_close(cpo_loss(chosen, rejected, lengths, beta=0.4, likelihood_weight=0.0), dpo)


def test_gradients_equal_finite_differences():
    chosen, rejected, *lengths = batch()
    leaves = chosen.requires_grad_(), rejected.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda w, r: cpo_loss(w, r, lengths[0], label_smoothing=0.1), leaves)
    assert check(lambda w, r: simpo_loss(w, r, *lengths), leaves)
    assert check(lambda w, r: orpo_loss(w, r, *lengths), leaves)


def test_orpo_at_both_ends_of_probability():
    one = torch.ones(5).long()
    chosen = torch.tensor([0.0, -1e-8, -1e4, -0.7, -1e-3], requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, 0.0, -0.7, -1e4], requires_grad=True)
    loss = orpo_loss(chosen, rejected, one, one, odds_weight=1.0)
    assert loss.isfinite().all()
    assert loss[3].item() == pytest.approx(0.7 + math.log(2), rel=1e-6)
    loss.sum().backward()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()
    # p = e^−0.001: log(1 − p) must keep its digits in float32; a rejected answer of the same p balances it
    same = orpo_loss(torch.tensor([-1e-3]), torch.tensor([-2e-3]), one[:1], one[:1], odds_weight=1.0).item()
    odds = [1 / math.expm1(1e-3), 1 / math.expm1(2e-3)]
    assert same == pytest.approx(1e-3 - math.log(odds[0] / sum(odds)), rel=1e-5)


def test_far_apart_half_precision_and_empty_answers():
    far, other = torch.tensor([1e4, -1e4]).neg(), torch.tensor([-2e4, -1.0])
    lengths = torch.tensor([1, 1]), torch.tensor([1, 0])
    for dtype in (torch.float32, torch.bfloat16):
        w, r = far.to(dtype).requires_grad_(), other.to(dtype).requires_grad_()
        for loss in (cpo_loss(w, r, lengths[0]), simpo_loss(w, r, *lengths), orpo_loss(w, r, *lengths)):
            assert loss.dtype == torch.float32
            assert loss.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (w, r)))


def test_bad_input_is_named():
    rows, lengths = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"rejected_logprobs \[2\]"):
        cpo_loss(rows, rows[:2], lengths)
    with pytest.raises(ValueError, match=r"rejected_logprobs \[2\]"):
        orpo_loss(rows, rows[:2], lengths, lengths[:2])
    with pytest.raises(ValueError, match=r"rejected_logprobs \[1\]"):
        simpo_loss(rows, rows[:1], lengths, lengths[:1])
    with pytest.raises(ValueError, match=r"lengths \[1\]"):
        simpo_loss(rows, rows, lengths, lengths[:1])
    with pytest.raises(ValueError, match="beta is -1"):
        simpo_loss(rows, rows, lengths, lengths, beta=-1)
    with pytest.raises(ValueError, match="beta is 0"):
        simpo_loss(rows, rows, lengths, lengths, beta=0)
