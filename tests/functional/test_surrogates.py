"""Surrogates by hand, against plain loops, and in expectation over every sequence of a small policy."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.importance import (
    per_decision_log_weights,
    sequence_ratios,
    token_ratios,
    trajectory_log_weights,
)
from taurl.functional.surrogates import (
    cispo,
    clip_indicators,
    clipped_surrogate,
    importance_weighted,
    kl_penalized,
    reinforce,
    sapo,
    vespo,
)

BOUNDS = {"clip_low": 0.2, "clip_high": 0.3}
seeds = st.integers(0, 2**31)
few = settings(max_examples=15)
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


def test_dual_clip_stops_what_a_bad_token_can_cost():
    #   ratio, A, loss, slope, high: c = 3
    cases = [
        (2.9, -2.0, 5.8, 2.0, False),
        (3.5, -2.0, 6.0, 0.0, True),
        (1e20, -2.0, 6.0, 0.0, True),
        (3.5, 2.0, -2.6, 0.0, True),  # the other clip
        (0.5, -2.0, 1.6, 0.0, False),  # low
        (3.5, 0.0, 0.0, 0.0, False),
    ]
    ratio, advantage, loss, slope, high = (list(column) for column in zip(*cases, strict=True))
    ratios = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    result = clipped_surrogate(ratios, advantages, **BOUNDS, dual_clip=3.0)
    assert result[0].tolist() == pytest.approx(loss, rel=1e-14)
    result.sum().backward()
    assert ratios.grad[0].tolist() == pytest.approx(slope, rel=1e-14)
    assert clip_indicators(ratios, advantages, **BOUNDS, dual_clip=3.0)[1][0].tolist() == high
    with pytest.raises(ValueError, match=r"dual_clip is 1\.0"):
        clipped_surrogate(ratios, advantages, **BOUNDS, dual_clip=1.0)


def test_sequence_ratios_are_clipped_as_a_whole():
    """GSPO: the row's tokens move together; a bad row far above and a good row far above, three tokens and two."""
    old = torch.zeros(2, 3, dtype=torch.float64)
    logprobs = torch.tensor([[0.9, 0.0, 0.3], [0.2, 0.8, 7.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    ratios = sequence_ratios(logprobs, old, mask)
    losses = clipped_surrogate(ratios, torch.tensor([[-1.0], [1.0]]), **BOUNDS)
    assert losses[0].tolist() == pytest.approx([math.exp(0.4)] * 3, rel=1e-14)
    assert losses[1].tolist() == pytest.approx([-1.3] * 3, rel=1e-14)
    losses[mask].sum().backward()
    assert logprobs.grad[0].tolist() == pytest.approx([math.exp(0.4)] * 3, rel=1e-14)  # 3 tokens, each a third of s
    assert logprobs.grad[1].tolist() == [0, 0, 0]


def test_one_advantage_per_sequence_and_no_clip():
    ratios = torch.tensor([[0.1, 9.0], [0.1, 9.0]])
    advantages = torch.tensor([[1.0], [-1.0]])
    result = clipped_surrogate(ratios, advantages, clip_low=math.inf, clip_high=math.inf)
    assert torch.equal(result, -ratios * advantages)


def sample(seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities now, before, and advantages of both signs, one of them 0; [3, 4]."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, old = -2 * torch.rand(2, 3, 4, dtype=torch.float64, generator=generator)
    advantages = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    advantages[0, 0] = 0.0
    return logprobs.requires_grad_(), old, advantages


def check(losses: Tensor, logprobs: Tensor, loss: list[float], gradient: list[float]) -> None:
    assert losses.flatten().tolist() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    (found,) = torch.autograd.grad(losses.sum(), logprobs, retain_graph=True)
    assert found.flatten().tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-14)


def triples(*tensors: Tensor) -> list[tuple[float, ...]]:
    return list(zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True))


def test_reinforce_with_and_without_weights():
    logprobs, old, advantages = sample()
    check(
        reinforce(logprobs, advantages),
        logprobs,
        [-x * a for x, a in triples(logprobs, advantages)],
        [-a for a in advantages.flatten().tolist()],
    )
    weights = token_ratios(logprobs, old)  # carries a gradient, which must not count
    check(
        reinforce(logprobs, advantages, weights=weights),
        logprobs,
        [-w * x * a for w, x, a in triples(weights, logprobs, advantages)],
        [-w * a for w, a in triples(weights, advantages)],
    )


def test_importance_weighted_and_kl_penalized():
    logprobs, old, advantages = sample()
    ratios = token_ratios(logprobs, old)
    check(
        importance_weighted(ratios, advantages),
        logprobs,
        [-math.exp(x - y) * a for x, y, a in triples(logprobs, old, advantages)],
        [-math.exp(x - y) * a for x, y, a in triples(logprobs, old, advantages)],
    )
    check(
        kl_penalized(ratios, advantages, 0.5 * (logprobs - old).square(), kl_coefficient=0.7),
        logprobs,
        [-math.exp(x - y) * a + 0.35 * (x - y) ** 2 for x, y, a in triples(logprobs, old, advantages)],
        [-math.exp(x - y) * a + 0.7 * (x - y) for x, y, a in triples(logprobs, old, advantages)],
    )
    differentiable = [importance_weighted, lambda r, a: kl_penalized(r, a, r.square(), kl_coefficient=0.7)]
    for function in differentiable:
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, advantages), ratios.detach().requires_grad_())


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    logprobs, old, advantages = sample()
    ratios = token_ratios(logprobs, old)
    assert (ratios > 1.3).any()
    weights = [min(r, 1.3) for r in ratios.flatten().tolist()]
    check(
        cispo(logprobs, ratios, advantages, clip_high=0.3),
        logprobs,
        [-w * x * a for w, (x, a) in zip(weights, triples(logprobs, advantages), strict=True)],
        [-w * a for w, a in zip(weights, advantages.flatten().tolist(), strict=True)],
    )
    # Without a cap its gradient is that of −ρ·A.
    (ours,) = torch.autograd.grad(cispo(logprobs, ratios, advantages, clip_high=math.inf).sum(), logprobs)
    (plain,) = torch.autograd.grad(importance_weighted(token_ratios(logprobs, old), advantages).sum(), logprobs)
    assert torch.allclose(ours, plain, rtol=1e-14)


def test_sapo_gate():
    logprobs, old, advantages = sample()
    ratios = token_ratios(logprobs, old)
    temperatures = [2.0 if a > 0 else 5.0 for a in advantages.flatten().tolist()]
    losses = sapo(ratios, advantages, positive_temperature=2.0, negative_temperature=5.0)
    cases = list(zip(temperatures, triples(ratios, advantages), strict=True))
    check(
        losses,
        logprobs,
        [-4 / tau / (1 + math.exp(-tau * (r - 1))) * a for tau, (r, a) in cases],
        [-a * r / math.cosh(tau * (r - 1) / 2) ** 2 for tau, (r, a) in cases],
    )
    assert torch.autograd.gradcheck(lambda x: sapo(x, advantages), ratios.detach().requires_grad_())
    with pytest.raises(ValueError, match="negative_temperature is 0"):
        sapo(ratios, advantages, negative_temperature=0)


def test_vespo_scales_each_trajectory():
    logprobs, old, advantages = sample()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    log_weights = trajectory_log_weights(logprobs, old, mask)
    scales = []
    for row in range(3):
        weight = math.prod(math.exp((logprobs - old)[row, t].item()) for t in range(4) if mask[row, t])
        for a in advantages[row].tolist():
            power, decay = (1.5, 0.5) if a >= 0 else (2.5, 0.25)
            scales.append(weight**power * math.exp(decay * (1 - weight)))
    check(
        vespo(logprobs, log_weights, advantages, positive=(1.5, 0.5), negative=(2.5, 0.25)),
        logprobs,
        [-s * x * a for s, (x, a) in zip(scales, triples(logprobs, advantages), strict=True)],
        [-s * a for s, a in zip(scales, advantages.flatten().tolist(), strict=True)],
    )
    with pytest.raises(ValueError, match="positive k is 0"):
        vespo(logprobs, log_weights, advantages, positive=(0, 1))


def test_vespo_climbs_the_saturating_objective_of_its_paper():
    """φ(W) = W · f'(W) for f(W) = e^λ λ^(−k) · γ(k, λW), the incomplete gamma function: differences of f·A in log π."""
    logprobs, old, advantages = sample()
    rows = advantages[:, :1].clone()
    rows[0] = 0.8
    mask = torch.ones(3, 4, dtype=torch.bool)
    losses = vespo(logprobs, trajectory_log_weights(logprobs, old, mask), rows)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)

    def objective(row: int, shift: float) -> float:
        a = rows[row].item()
        power, decay = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
        weight = ((logprobs - old)[row].sum() + shift).exp()
        regularized = torch.special.gammainc(torch.tensor(power, dtype=torch.float64), decay * weight).item()
        return math.exp(decay) * decay**-power * math.gamma(power) * regularized * a

    for row in range(3):
        slope = (objective(row, 1e-4) - objective(row, -1e-4)) / 2e-4
        assert gradient[row].tolist() == pytest.approx([-slope] * 4, rel=1e-5)


SURROGATES = {
    "reinforce": lambda x, old, a: reinforce(x, a),
    "importance_weighted": lambda x, old, a: importance_weighted(token_ratios(x, old), a),
    "clip": lambda x, old, a: clipped_surrogate(token_ratios(x, old), a, **BOUNDS, dual_clip=3.0),
    "cispo": lambda x, old, a: cispo(x, token_ratios(x, old), a, clip_high=0.3),
    "sapo": lambda x, old, a: sapo(token_ratios(x, old), a, positive_temperature=0.5, negative_temperature=7.0),
    "vespo": lambda x, old, a: vespo(x, trajectory_log_weights(x, old, torch.ones_like(x).bool()), a),
    "kl": lambda x, old, a: kl_penalized(token_ratios(x, old), a, (x - old).square(), kl_coefficient=0.7),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_at_ratio_one_every_gradient_is_the_policy_gradient(name):
    logprobs, _, advantages = sample()
    (gradient,) = torch.autograd.grad(SURROGATES[name](logprobs, logprobs.detach(), advantages).sum(), logprobs)
    assert torch.allclose(gradient, -advantages, rtol=1e-13)


@pytest.mark.parametrize("name", SURROGATES)
def test_no_gradient_into_advantages_and_half_precision_is_widened(name):
    logprobs, old, advantages = sample()
    losses = SURROGATES[name](logprobs, old, advantages.requires_grad_())
    assert torch.autograd.grad(losses.sum(), [logprobs, advantages], allow_unused=True)[1] is None
    single = SURROGATES[name](logprobs[:1, :1].bfloat16(), old[:1, :1].bfloat16(), advantages[:1, :1].bfloat16())
    assert single.dtype == torch.float32
    assert single.shape == (1, 1)


@pytest.mark.parametrize("name", SURROGATES)
def test_huge_and_tiny_ratios_stay_finite(name):
    logprobs = torch.tensor([[-1.0, -1e4, -80.0, -2e3]] * 2, requires_grad=True)
    old = torch.tensor([[-1e4, -1.0, -1.0, -2e3]] * 2)
    losses = SURROGATES[name](logprobs, old, torch.tensor([[2.0], [-2.0]]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logprobs.grad.isfinite().all()


# Every sequence over {0, 1, 2} that ends with its first 0 or after three tokens, and every prefix of one.
SEQUENCES = [
    s for n in (1, 2, 3) for s in itertools.product(range(3), repeat=n) if 0 not in s[:-1] and (n == 3 or not s[-1])
]
PREFIXES = sorted({s[:t] for s in SEQUENCES for t in range(len(s))})
MASK = torch.tensor([[t < len(s) for t in range(3)] for s in SEQUENCES])


def logprobs_of(logits: Tensor) -> Tensor:
    """log π(token | all before it) of every sequence, [15, 3], 0 after its end; logits [7, 3], one row per prefix."""
    table = logits.log_softmax(-1)
    rows = [
        [table[PREFIXES.index(s[:t]), s[t]] if t < len(s) else table.new_zeros(()) for t in range(3)] for s in SEQUENCES
    ]
    return torch.stack([torch.stack(row) for row in rows])


def random_policies(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of a policy, log-probabilities under another one, returns [15, 1], and the exact ∇ E_θ[R]."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, len(PREFIXES), 3, dtype=torch.float64, generator=generator)
    returns = torch.randn(15, 1, dtype=torch.float64, generator=generator)
    ours.requires_grad_()
    value = (logprobs_of(ours).sum(1, keepdim=True).exp() * returns).sum()
    return ours, logprobs_of(theirs), returns, torch.autograd.grad(value, ours)[0]


def expected_gradient(losses: Tensor, drawn_by: Tensor, logits: Tensor) -> Tensor:
    """∇ of E over the sequences that a policy draws, its probabilities held fixed, of the sum over tokens."""
    probabilities = drawn_by.detach().sum(1, keepdim=True).exp()
    return torch.autograd.grad((probabilities * losses * MASK).sum(), logits, retain_graph=True)[0]


@given(seeds, st.floats(-3, 3))
@few
def test_on_policy_the_surrogates_have_the_exact_policy_gradient(seed, baseline):
    """At θ = θ_old, by enumeration, whatever the baseline."""
    logits, _, returns, exact = random_policies(seed)
    logprobs = logprobs_of(logits)
    for losses in (
        reinforce(logprobs, returns - baseline),
        importance_weighted(token_ratios(logprobs, logprobs.detach()), returns - baseline),
        clipped_surrogate(token_ratios(logprobs, logprobs.detach()), returns - baseline, **BOUNDS),
        clipped_surrogate(sequence_ratios(logprobs, logprobs.detach(), MASK), returns - baseline, **BOUNDS),
    ):
        gradient = expected_gradient(losses, logprobs, logits)
        assert torch.allclose(gradient, -exact, rtol=1e-9, atol=1e-12)


@given(seeds, st.floats(-3, 3))
@few
def test_off_policy_the_weights_restore_the_exact_policy_gradient(seed, baseline):
    """From the sequences of any θ', the same call with weights; without them it is another gradient."""
    logits, theirs, returns, exact = random_policies(seed)
    logprobs = logprobs_of(logits)
    weights = trajectory_log_weights(logprobs, theirs, MASK).exp()[:, None]
    gradient = expected_gradient(reinforce(logprobs, returns - baseline, weights=weights), theirs, logits)
    assert torch.allclose(gradient, -exact, rtol=1e-9, atol=1e-12)
    unweighted = expected_gradient(reinforce(logprobs_of(logits), returns - baseline), theirs, logits)
    assert not torch.allclose(unweighted, -exact, rtol=1e-2)


@given(seeds)
@few
def test_per_decision_weights_are_enough_for_an_advantage_of_each_step(seed):
    """With A(s, a) instead of a return nothing after the step matters, and its weight ends there."""
    logits, theirs, returns, exact = random_policies(seed)
    logprobs = logprobs_of(logits)
    probabilities = logprobs.detach().sum(1).exp()
    values = torch.zeros(15, 3, dtype=torch.float64)  # Q(s, a), exactly
    for i, s in enumerate(SEQUENCES):
        for t in range(len(s)):
            same = torch.tensor([other[: t + 1] == s[: t + 1] for other in SEQUENCES])
            values[i, t] = (probabilities * returns[:, 0])[same].sum() / probabilities[same].sum()
    weights = per_decision_log_weights(logprobs, theirs, MASK).exp()
    gradient = expected_gradient(reinforce(logprobs, values, weights=weights), theirs, logits)
    assert torch.allclose(gradient, -exact, rtol=1e-9, atol=1e-12)


def test_bad_input_is_named():
    square = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"advantages \[3\]"):  # would broadcast along the wrong axis
        clipped_surrogate(square, torch.ones(3), **BOUNDS)
    with pytest.raises(ValueError, match=r"clip_low is -0\.1"):
        clip_indicators(square, square, clip_low=-0.1, clip_high=0.2)
    with pytest.raises(ValueError, match="weights"):
        reinforce(square, square, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"log_weights \[3, 1, 1\]"):
        vespo(square, torch.ones(3, 1), square)
    with pytest.raises(ValueError, match="divergences"):
        kl_penalized(square, square, torch.ones(3, 1), kl_coefficient=0.1)
    with pytest.raises(ValueError, match=r"kl_coefficient is -0\.1"):
        kl_penalized(square, square, square, kl_coefficient=-0.1)
    with pytest.raises(ValueError, match=r"clip_high is -1"):
        cispo(square, square, square, clip_high=-1)


def test_a_weight_of_zero_outweighs_a_token_that_cannot_be_drawn():
    """p_θ(τ) = 0 is a weight of 0, and so is VESPO's φ at W = 0; the loss is then 0, as those of PPO and GRPO are."""
    logprobs = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    advantages, zero = torch.ones(1, 2), torch.zeros(1, 2)
    for loss in (
        reinforce(logprobs, advantages, weights=zero),
        vespo(logprobs, torch.tensor([-math.inf]), advantages),
    ):
        assert torch.equal(loss, zero)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert torch.equal(gradient, zero)


def test_parameters_of_vespo_that_are_no_positive_numbers_are_refused():
    row = torch.zeros(1, 1)
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"positive λ is {bad}, expected a positive, finite number"):
            vespo(row, row[0], row, positive=(2.0, bad))
