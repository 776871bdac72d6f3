"""The named loss types: each against a plain loop, its first gradient, and its independence of how the batch is cut."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.aggregation import weighted_sum
from taurl.functional.importance import sequence_ratios
from taurl.functional.loss_types import LOSS_TYPES, LossType, clipped_tokens, loss_weights, policy_loss

NAMES = list(LOSS_TYPES)
CLIPS = ["grpo", "dr_grpo", "dapo", "bnpo", "luspo"]
LEVELS = ["token", "sequence", "sequence_token"]
# name and level, None for the loss type's own
CASES = [(name, None) for name in NAMES] + [(n, level) for n in NAMES if n != "vespo" for level in LEVELS]
OPTIONS = {
    "clip_low": 0.2,
    "clip_high": 0.3,
    "dual_clip": 2.5,
    "sapo_temperatures": (0.5, 2.0),
    "vespo_kernels": ((1.5, 0.5), (2.5, 0.25)),
}


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities now, before, one advantage per row, and a mask with a full row, a gap and an empty row.

    The ratios lie in every region of every clip, for tokens and for sequences (their means are 1.5, 0.77 and 2.65).
    """
    logprobs = -1.5 * torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    ratios = [[1.6, 2.9, 0.9, 1.2], [0.5, 3.0, 0.3, 9.0], [9.0, 2.6, 9.0, 2.7], [0.7, 1.5, 9.0, 9.0], [9.0] * 4]
    advantages = torch.tensor([[1.5], [-2.0], [-0.5], [0.0], [1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    return logprobs, logprobs - torch.tensor(ratios, dtype=torch.float64).log(), advantages, mask


def extras(name: str) -> dict:
    """OPTIONS, as far as the loss type has them."""
    return OPTIONS if name in CLIPS else {key: value for key, value in OPTIONS.items() if key != "dual_clip"}


def one_loss(surrogate: str, ratio: float, weight: float, logprob: float, a: float) -> float:
    """The formulas once more, in plain floats, with OPTIONS."""
    if surrogate == "clip":
        objective = min(ratio * a, min(max(ratio, 0.8), 1.3) * a)
        return -(max(objective, 2.5 * a) if a < 0 else objective)
    if surrogate == "cispo":
        return -min(ratio, 1.3) * a * logprob
    if surrogate == "sapo":
        tau = 0.5 if a > 0 else 2.0
        return -4 / (tau * (1 + math.exp(-tau * (ratio - 1)))) * a
    power, decay = (1.5, 0.5) if a >= 0 else (2.5, 0.25)
    return -(weight**power) * math.exp(decay * (1 - weight)) * a * logprob


@pytest.mark.parametrize(("name", "level"), CASES)
def test_losses_equal_a_loop(name, level):
    logprobs, old, advantages, mask = batch()
    losses = policy_loss(name, logprobs, old, advantages, mask, ratio_level=level, **extras(name))
    used = level or LOSS_TYPES[name].ratio_level
    for i in range(5):
        tokens = [math.exp((logprobs - old)[i, t].item()) for t in range(4) if mask[i, t]]
        whole = math.prod(tokens)
        for t in range(4):
            if not mask[i, t]:
                assert losses[i, t] == 0
                continue
            ratio = math.exp((logprobs - old)[i, t].item()) if used == "token" else whole ** (1 / len(tokens))
            expected = one_loss(
                LOSS_TYPES[name].surrogate, ratio, whole, logprobs[i, t].item(), advantages[i, 0].item()
            )
            assert losses[i, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", [*CLIPS, "sapo"])
def test_gradient_equals_finite_differences(name, level):
    """Of those that are their own objective; cispo, vespo and sequence_token stop a gradient on purpose."""
    logprobs, old, advantages, mask = batch()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(name, x, old, advantages, mask, ratio_level=level, **extras(name)),
        logprobs.requires_grad_(),
    )


@pytest.mark.parametrize(("name", "level"), CASES)
def test_on_the_first_update_the_gradient_is_minus_the_advantage(name, level):
    logprobs, _, advantages, mask = batch()
    logprobs.requires_grad_()
    policy_loss(name, logprobs, logprobs.detach(), advantages, mask, ratio_level=level, **extras(name)).sum().backward()
    assert torch.allclose(logprobs.grad, torch.where(mask, -advantages, 0.0), rtol=1e-13)


def test_what_a_name_means_for_the_whole_batch():
    """First update: each loss type's gradient by a token's log-probability, rows of 4, 3, 2, 2 and 0 tokens."""
    logprobs, _, advantages, mask = batch()
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    shares = {
        "grpo": 1 / (4 * lengths),  # the empty row is no sequence
        "sapo": 1 / (4 * lengths),
        "dr_grpo": torch.tensor(1 / (4 * 10)),
        "dapo": torch.tensor(1 / 11),
        "bnpo": torch.tensor(1 / 11),
        "cispo": torch.tensor(1 / 11),
        "vespo": torch.tensor(1 / 11),
        "luspo": torch.tensor(1 / 4),
    }
    assert set(shares) == set(NAMES) == set(get_args(LossType))
    for name, share in shares.items():
        current = logprobs.clone().requires_grad_()
        losses = policy_loss(name, current, logprobs, advantages, mask)
        weighted_sum(losses, loss_weights(name, mask, max_tokens=10, dtype=torch.float64)).backward()
        assert torch.allclose(current.grad, torch.where(mask, -advantages * share, 0.0), rtol=1e-13), name


def test_gspo_and_luspo_differ_by_the_length_alone():
    logprobs, old, advantages, mask = batch()
    ratios = sequence_ratios(logprobs, old, mask)[:, 0]
    rows = [
        min(r * a, min(max(r, 0.8), 1.3) * a) for r, a in zip(ratios.tolist(), advantages[:, 0].tolist(), strict=True)
    ]
    lengths = mask.sum(1).tolist()
    for name, expected in {
        "grpo": -sum(r for r, n in zip(rows, lengths, strict=True) if n) / 4,
        "luspo": -sum(r * n for r, n in zip(rows, lengths, strict=True)) / 4,
    }.items():
        losses = policy_loss(name, logprobs, old, advantages, mask, ratio_level="sequence", clip_high=0.3)
        found = weighted_sum(losses, loss_weights(name, mask, max_tokens=10, dtype=torch.float64))
        assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "level"), CASES)
def test_masked_positions_may_hold_anything(name, level):
    logprobs, old, advantages, mask = batch()
    clean = logprobs.clone().requires_grad_()
    expected = policy_loss(name, clean, old, advantages, mask, ratio_level=level)
    expected.sum().backward()
    for rubbish in (math.nan, math.inf, -math.inf):
        spoiled = logprobs.masked_fill(~mask, rubbish).requires_grad_()
        per_token = advantages.expand(5, 4).masked_fill(~mask, rubbish)
        losses = policy_loss(name, spoiled, old.masked_fill(~mask, rubbish), per_token, mask, ratio_level=level)
        assert torch.equal(losses, expected)
        losses.sum().backward()
        assert torch.equal(spoiled.grad, clean.grad)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_mix_and_padding_does_not_count(name):
    logprobs, old, advantages, mask = batch()
    whole = policy_loss(name, logprobs, old, advantages, mask)
    for rows in ([3, 1], [2], [4], [0]):
        length = int(mask[rows].nonzero()[:, 1].max()) + 1 if mask[rows].any() else 1
        part = policy_loss(name, *(x[rows, :length] for x in (logprobs, old)), advantages[rows], mask[rows, :length])
        assert torch.allclose(part, whole[rows, :length], rtol=1e-14)


@pytest.mark.parametrize(("name", "level"), CASES)
def test_huge_and_tiny_ratios_and_half_precision(name, level):
    logprobs = torch.tensor([[0.0, -1e4, -90.0], [-0.5, -0.5, -0.5]]).repeat(2, 1).bfloat16().requires_grad_()
    old = torch.tensor([[-1e4, 0.0, 0.0], [-200.0, -300.0, -400.0]]).repeat(2, 1).bfloat16()
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    losses = policy_loss(name, logprobs, old, advantages, torch.ones(4, 3).bool(), ratio_level=level)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_clipped_tokens_are_where_the_gradient_is_gone():
    logprobs, old, advantages, mask = batch()
    advantages = advantages + 0.1  # no zero, whose gradient is gone anyway
    options = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 2.5}
    for name, level in itertools.product(CLIPS, LEVELS):
        low, high = clipped_tokens(name, logprobs, old, advantages, mask, ratio_level=level, **options)
        current = logprobs.clone().requires_grad_()
        policy_loss(name, current, old, advantages, mask, ratio_level=level, **options).sum().backward()
        assert low.any()
        assert high.any()
        assert torch.equal((current.grad == 0) & mask, low | high)
    del options["dual_clip"]
    for level in LEVELS:
        low, high = clipped_tokens("cispo", logprobs, old, advantages, mask, ratio_level=level, **options)
        ratios = (logprobs - old).exp()
        if level != "token":
            ratios = sequence_ratios(logprobs, old, mask)
        assert not low.any()
        assert torch.equal(high, mask & (ratios > 1.3))
    assert (high & (advantages < 0)).any()
    for name in ("sapo", "vespo"):
        assert not torch.stack(clipped_tokens(name, logprobs, old, advantages, mask)).any()


@given(st.integers(0, 2**31), st.floats(-3, 3))
@settings(max_examples=10)
def test_on_the_first_update_luspo_and_dr_grpo_climb_the_expected_return(seed, baseline):
    """By enumeration of a policy over {0, 1}, three tokens or fewer; 1/n is the probability, max_tokens a factor."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [
        s for n in (1, 2, 3) for s in itertools.product((0, 1), repeat=n) if 0 not in s[:-1] and (n == 3 or not s[-1])
    ]
    mask = torch.tensor([[t < len(s) for t in range(3)] for s in sequences])
    logits = torch.randn(3, 2, dtype=torch.float64, generator=generator).requires_grad_()  # the prefix is all ones
    returns = torch.randn(len(sequences), 1, dtype=torch.float64, generator=generator)
    table = logits.log_softmax(-1)
    logprobs = torch.stack(
        [torch.stack([table[t, s[t]] if t < len(s) else table.new_zeros(()) for t in range(3)]) for s in sequences]
    )
    probabilities = logprobs.sum(1, keepdim=True).exp()
    (exact,) = torch.autograd.grad((probabilities * returns).sum(), logits, retain_graph=True)
    for name, factor in {"luspo": 1, "dr_grpo": 3}.items():
        losses = policy_loss(name, logprobs, logprobs, returns - baseline, mask)
        weights = loss_weights(name, mask, max_tokens=3, dtype=torch.float64) * len(sequences) * probabilities.detach()
        (gradient,) = torch.autograd.grad(weighted_sum(losses, weights), logits, retain_graph=True)
        assert torch.allclose(gradient * factor, -exact, rtol=1e-9, atol=1e-12)


def test_bnpo_is_dapo():
    assert LOSS_TYPES["bnpo"][:3] == LOSS_TYPES["dapo"][:3]


def test_the_clip_is_the_loss_types_own_where_none_is_given():
    logprobs, old, advantages, mask = batch()
    old = torch.cat([old[:2], old[2:] - 2])  # ratios above 5 too
    advantages = advantages.abs()
    for name, own in {"dapo": 0.2, "cispo": 4.0}.items():
        given = policy_loss(name, logprobs, old, advantages, mask, clip_high=own)
        assert torch.equal(policy_loss(name, logprobs, old, advantages, mask), given)
        assert not torch.equal(policy_loss(name, logprobs, old, advantages, mask, clip_high=own + 1), given)


def test_bad_input_is_named():
    logprobs, old, advantages, mask = batch()
    with pytest.raises(ValueError, match="loss_type is 'ppo', expected one of grpo, dr_grpo"):
        policy_loss("ppo", logprobs, old, advantages, mask)
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        loss_weights("ppo", mask, max_tokens=4)
    with pytest.raises(ValueError, match="ratio_level is 'row', expected one of token, sequence"):
        policy_loss("grpo", logprobs, old, advantages, mask, ratio_level="row")
    with pytest.raises(ValueError, match="vespo weighs whole trajectories"):
        clipped_tokens("vespo", logprobs, old, advantages, mask, ratio_level="token")
    with pytest.raises(ValueError, match="dual_clip is 2, but sapo does not clip"):
        policy_loss("sapo", logprobs, old, advantages, mask, dual_clip=2)
    with pytest.raises(ValueError, match="boolean mask"):
        policy_loss("grpo", logprobs, old, advantages, mask.float())
    with pytest.raises(ValueError, match=r"old_logprobs \[5, 1\]"):
        policy_loss("grpo", logprobs, old[:, :1], advantages, mask)
    with pytest.raises(ValueError, match=r"advantages \[5\]"):
        policy_loss("grpo", logprobs, old, advantages[:, 0], mask)
    with pytest.raises(ValueError, match="clip_low is -1"):
        policy_loss("dapo", logprobs, old, advantages, mask, clip_low=-1)
