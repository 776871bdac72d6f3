"""KL: estimates by enumeration of a small vocabulary, exact values by loops and quadrature, penalties, losses.

What each of them descends is in test_kl_gradients.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taurl.functional.aggregation import token_weights, weighted_sum
from taurl.functional.importance import LARGEST_LOG_RATIO
from taurl.functional.kl import categorical_kl, diagonal_gaussian_kl, k1, k2, k3, kl_loss, kl_penalty

POLICY = torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03], dtype=torch.float64)
REFERENCE = torch.tensor([0.3, 0.4, 0.1, 0.1, 0.1], dtype=torch.float64)


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    return sum(p * math.log(p / q) for p, q in zip(first.tolist(), second.tolist(), strict=True))


def expectation(estimator, policy: torch.Tensor, reference: torch.Tensor) -> float:
    return (policy * estimator(policy.log(), reference.log())).sum().item()


def test_k1_and_k3_have_the_divergence_as_expectation():
    for estimator in (k1, k3):
        assert expectation(estimator, POLICY, REFERENCE) == pytest.approx(divergence(POLICY, REFERENCE), rel=1e-13)


def test_k2_is_half_the_second_moment_and_its_bias_is_of_third_order():
    expected = sum(p * math.log(p / q) ** 2 / 2 for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))
    assert expectation(k2, POLICY, REFERENCE) == pytest.approx(expected, rel=1e-13)
    biases = []
    for distance in (1e-2, 1e-3):
        near = torch.softmax(POLICY.log() + distance * REFERENCE.log(), 0)
        biases.append(abs(expectation(k2, POLICY, near) - divergence(POLICY, near)))
    assert 0 < biases[1] < biases[0] / 900


def test_signs():
    assert k1(POLICY.log(), REFERENCE.log()).sign().tolist() == [1, -1, 1, -1, -1]
    assert (k2(POLICY.log(), REFERENCE.log()) > 0).all()
    assert (k3(POLICY.log(), REFERENCE.log()) > 0).all()


def test_expected_gradient_of_each_as_a_loss():
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0, -1.0], dtype=torch.float64, requires_grad=True)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits)[0]

    def expected_gradient(estimator) -> torch.Tensor:
        logprobs = logits.log_softmax(0)
        return gradient((logprobs.exp().detach() * estimator(logprobs, REFERENCE.log())).sum())

    logprobs = logits.log_softmax(0)
    forward = gradient((logprobs.exp() * (logprobs - REFERENCE.log())).sum())
    logprobs = logits.log_softmax(0)
    reverse = gradient(-(REFERENCE * logprobs).sum())
    torch.testing.assert_close(expected_gradient(k1), torch.zeros_like(forward), rtol=0, atol=1e-15)
    torch.testing.assert_close(expected_gradient(k2), forward, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(expected_gradient(k3), reverse, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradient_equals_finite_differences(estimator):
    logprobs = POLICY.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: estimator(x, REFERENCE.log()), logprobs)


def test_close_and_distant_policies():
    near = k3(torch.tensor([3e-4]), torch.tensor([0.0]))  # x²/2 is below the rounding of exp(−x) − 1 in float32
    assert near.item() == pytest.approx(3e-4**2 / 2, rel=1e-3)
    distant = k3(torch.tensor([-1e3, 0.0]), torch.tensor([0.0, -1e3]))
    assert distant.isfinite().all()
    assert k3(torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="expected one shape"):
        k1(torch.zeros(2), torch.zeros(1))


# Penalties and losses. MASK has a row with holes and one without tokens; what it hides is NaN or infinite.

ESTIMATES = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}
MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logprobs, reference = -3 * torch.rand(2, 3, 5, dtype=torch.float64, generator=generator)
    return logprobs.masked_fill(~MASK, math.nan), reference.masked_fill(~MASK, -math.inf)


def log_ratios() -> list[list[float | None]]:
    logprobs, reference = example()
    return [
        [logprobs[i, t].item() - reference[i, t].item() if MASK[i, t] else None for t in range(5)] for i in range(3)
    ]


def test_penalty_of_a_hand_worked_row():
    logprobs, reference = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-1.5, -1.0, -0.5]])  # x = ½, −1, 0
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert kl_penalty(logprobs, reference, mask).tolist() == [[-0.5, -1, 0]]
    assert kl_penalty(logprobs, reference, mask, estimator="k2").tolist() == [[0.625, 0.5, 0]]
    assert kl_penalty(logprobs, reference, mask, level="sequence").tolist() == [[-0.5] * 3]
    assert kl_penalty(logprobs, reference, mask, estimator="k2", level="sequence").tolist() == [[0.125] * 3]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalty_equals_a_loop(estimator):
    token = kl_penalty(*example(), MASK, estimator=estimator, level="token")
    sequence = kl_penalty(*example(), MASK, estimator=estimator, level="sequence")
    for i, row in enumerate(log_ratios()):
        for t, x in enumerate(row):
            to_go = sum(ESTIMATES[estimator](later) for later in row[t:] if later is not None)
            whole = ESTIMATES[estimator](sum(each for each in row if each is not None))
            assert token[i, t].item() == pytest.approx(0 if x is None else to_go, rel=1e-13)
            assert sequence[i, t].item() == pytest.approx(0 if x is None else whole, rel=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_loss_equals_a_loop(estimator, weighted):
    generator = torch.Generator().manual_seed(6)
    ratios = (3 * torch.rand(3, 5, dtype=torch.float64, generator=generator)).masked_fill(~MASK, math.nan)
    given_ratios = ratios if weighted else None
    token = kl_loss(*example(), MASK, estimator=estimator, level="token", ratios=given_ratios)
    sequence = kl_loss(*example(), MASK, estimator=estimator, level="sequence", ratios=given_ratios)
    for i, row in enumerate(log_ratios()):
        present = [x for x in row if x is not None]
        for t, x in enumerate(row):
            weight = ratios[i, t].item() if weighted else 1
            own = 0 if x is None else weight * ESTIMATES[estimator](x)
            share = 0 if x is None else weight * ESTIMATES[estimator](sum(present)) / len(present)
            assert token[i, t].item() == pytest.approx(own, rel=1e-12)
            assert sequence[i, t].item() == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_sequence_loss_adds_up_to_the_estimate_of_the_sequence(estimator):
    loss = kl_loss(*example(), MASK, estimator=estimator, level="sequence")
    aggregated = weighted_sum(loss, token_weights(MASK, "constant", length=7, dtype=torch.float64))
    rows = [sum(x for x in row if x is not None) for row in log_ratios()[:2]]  # the empty row does not count
    assert aggregated.item() * 7 == pytest.approx(sum(map(ESTIMATES[estimator], rows)) / 2, rel=1e-13)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_loss_gradient_equals_finite_differences(estimator, level):
    logprobs, reference = (each.nan_to_num(0, 0, 0) for each in example())

    def loss(x: torch.Tensor) -> torch.Tensor:
        return kl_loss(x, reference, MASK, estimator=estimator, level=level)

    def weighted(x: torch.Tensor) -> torch.Tensor:
        ratios = (x - reference / 2).exp()
        return kl_loss(x, reference, MASK, estimator=estimator, level=level, ratios=ratios)

    assert torch.autograd.gradcheck(loss, logprobs.clone().requires_grad_())
    if estimator != "k2":  # its ratios are detached, which is no derivative of its value
        assert torch.autograd.gradcheck(weighted, logprobs.clone().requires_grad_())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_masked_positions_get_no_gradient_and_the_penalty_has_none(estimator, level):
    logprobs, reference = example()
    logprobs.requires_grad_()
    ratios = torch.full_like(reference, 2.0).masked_fill(~MASK, math.inf).requires_grad_()
    kl_loss(logprobs, reference, MASK, estimator=estimator, level=level, ratios=ratios).sum().backward()
    assert torch.equal(logprobs.grad[~MASK], torch.zeros(8, dtype=torch.float64))
    assert (logprobs.grad[MASK] != 0).all()
    if estimator == "k2":
        assert ratios.grad is None
    else:
        assert torch.equal(ratios.grad[~MASK], torch.zeros(8, dtype=torch.float64))
    assert not kl_penalty(logprobs, reference, MASK, estimator=estimator, level=level).requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_small_and_empty_batches(shape):
    logprobs, mask = -torch.rand(shape), torch.ones(shape, dtype=torch.bool)
    for level in ("token", "sequence"):
        penalty = kl_penalty(logprobs, logprobs - 2, mask, level=level)
        loss = kl_loss(logprobs, logprobs - 2, mask, estimator="k2", level=level)
        torch.testing.assert_close(penalty, torch.full(shape, 2.0))
        torch.testing.assert_close(loss, torch.full(shape, 2.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_far_policies_and_huge_ratios_stay_finite(estimator, level):
    logprobs = torch.tensor([[-200.0, -1.0, -300.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    reference, mask = torch.tensor([[-1.0, -300.0, -1.0], [-1.0, -200.0, -300.0]]), torch.ones(2, 3, dtype=torch.bool)
    for ratio in (0.0, 1e-30, math.exp(LARGEST_LOG_RATIO)):
        ratios = torch.full((2, 3), ratio)
        loss = kl_loss(logprobs, reference, mask, estimator=estimator, level=level, ratios=ratios)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert kl_penalty(logprobs, reference, mask, estimator=estimator, level=level).isfinite().all()


def test_beyond_its_bound_k3_is_constant():
    """With its slope, of what is left there: it would push a policy away from a reference that is far above it."""
    logprobs = torch.tensor([[-61.0, -500.0, -59.0]], dtype=torch.float64, requires_grad=True)
    reference, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    loss = kl_loss(logprobs, reference, mask, estimator="k3", level="token")
    (slopes,) = torch.autograd.grad(loss.sum(), logprobs)
    assert slopes.tolist() == [[0.0, 0.0, pytest.approx(1 - math.exp(59), rel=1e-12)]]
    assert loss[0].tolist() == pytest.approx([math.exp(60) - 61] * 2 + [math.exp(59) - 60], rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_nor_has_it_a_gradient_there_by_its_weight(level, weight):
    """Which carries one, on-policy as π / π.detach(): of the bounded value it would have the wrong sign."""
    logprobs = torch.tensor([[-33.0, -500.0], [-70.0, -3.0]], dtype=torch.float64, requires_grad=True)
    reference, mask = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)
    ratios = weight * torch.exp(logprobs - logprobs.detach())
    loss = kl_loss(logprobs, reference, mask, estimator="k3", level=level, ratios=ratios)
    (slopes,) = torch.autograd.grad(loss.sum(), logprobs)
    if level == "sequence":
        assert not slopes.any()
    else:
        assert slopes.tolist() == [[pytest.approx(-33 * weight, abs=1e3), 0.0], [0.0, pytest.approx(-3 * weight)]]


def test_half_precision_is_widened_before_anything_is_subtracted():
    logprobs, reference = torch.tensor([[-7.03125]]).bfloat16(), torch.tensor([[-0.0078125]]).bfloat16()
    mask = torch.ones(1, 1, dtype=torch.bool)
    penalty = kl_penalty(logprobs, reference, mask)
    loss = kl_loss(logprobs, reference, mask, estimator="k1", level="token", ratios=torch.ones(1, 1).bfloat16())
    for result in (penalty, loss):
        assert result.dtype == torch.float32
        assert result.item() == -7.0234375  # in bfloat16 it would be −7.03125
    assert categorical_kl(torch.zeros(2).half(), torch.zeros(2).half()).dtype == torch.float32
    assert diagonal_gaussian_kl(*[torch.zeros(2).bfloat16()] * 4).dtype == torch.float32


def test_bad_arguments_are_named():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for wrong in ({"estimator": "k4"}, {"level": "row"}):
        with pytest.raises(ValueError, match=r"expected '(k1|token)'"):
            kl_penalty(x, x, mask, **wrong)
        with pytest.raises(ValueError, match=r"expected '(k1|token)'"):
            kl_loss(x, x, mask, **{"estimator": "k1", "level": "token", **wrong})
    with pytest.raises(ValueError, match="expected one shape"):
        kl_penalty(x, x[:, :2], mask)
    with pytest.raises(ValueError, match="boolean mask"):
        kl_loss(x, x, mask.float(), estimator="k1", level="token")
    with pytest.raises(ValueError, match="expected one shape"):
        kl_loss(x, x, mask, estimator="k1", level="sequence", ratios=torch.ones(2, 1))
    with pytest.raises(ValueError, match="expected one shape"):
        categorical_kl(x, x[0])
    with pytest.raises(ValueError, match="at least one class"):
        categorical_kl(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(ValueError, match="expected one shape"):
        diagonal_gaussian_kl(x, x[0], x, x[0])
    for empty in (torch.tensor(0.0), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"expected \[..., d\] with at least one dimension"):
            diagonal_gaussian_kl(*[empty] * 4)


# Exact divergences.


def test_categorical_equals_a_loop_whatever_the_logits_are_shifted_by():
    shifted = torch.stack([POLICY.log() + 300, POLICY.log() - 5]).expand(2, 2, 5)
    references = torch.stack([REFERENCE.log() - 1000, REFERENCE.log()]).expand(2, 2, 5)
    expected = torch.full((2, 2), divergence(POLICY, REFERENCE), dtype=torch.float64)
    torch.testing.assert_close(categorical_kl(shifted, references), expected, rtol=1e-11, atol=0)


def test_categorical_gradient_equals_finite_differences():
    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return categorical_kl(first, second)

    inputs = [each.log().expand(2, 5).clone().requires_grad_() for each in (POLICY, REFERENCE)]
    assert torch.autograd.gradcheck(kl, inputs)
    assert torch.autograd.gradgradcheck(kl, inputs)


def test_forbidden_and_vanishing_classes():
    inf = math.inf
    policy = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, -inf], [0.0, 0.0, -1e4]], requires_grad=True)
    reference = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -inf], [0.0, 0.0, -inf]], requires_grad=True)
    result = categorical_kl(policy, reference)
    torch.testing.assert_close(result, torch.tensor([math.log(1.5), 0.0, 0.0]))
    result.sum().backward()
    assert policy.grad.isfinite().all()
    torch.testing.assert_close(reference.grad[0], torch.tensor([-1 / 6, -1 / 6, 1 / 3]))  # softmax(ref) − softmax(π)
    assert categorical_kl(torch.zeros(2), torch.tensor([0.0, -inf])).item() == inf
    assert categorical_kl(torch.tensor([math.nan, 0.0]), torch.zeros(2)).isnan()  # a broken policy is not at distance 0


def test_gaussian_of_a_hand_worked_case():
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    assert diagonal_gaussian_kl(one, zero, zero, zero).tolist() == [1]  # ½ per dimension
    wide = diagonal_gaussian_kl(zero, one * math.log(2), zero, zero)
    assert wide.item() == pytest.approx(2 * (2 - 0.5 - math.log(2)), rel=1e-6)


def test_gaussian_equals_quadrature():
    mean, log_std = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.2, -0.7]).double()
    reference_mean, reference_log_std = torch.tensor([-0.5, 0.1]).double(), torch.tensor([-0.1, 0.4]).double()
    expected = 0.0
    for m, s, rm, rs in zip(mean, log_std.exp(), reference_mean, reference_log_std.exp(), strict=True):
        grid = torch.linspace((m - 12 * s).item(), (m + 12 * s).item(), 4001, dtype=torch.float64)
        log_p, log_q = (
            -(((grid - a) / b) ** 2) / 2 - b.log() - math.log(2 * math.pi) / 2 for a, b in ((m, s), (rm, rs))
        )
        expected += torch.trapezoid(log_p.exp() * (log_p - log_q), grid).item()
    result = diagonal_gaussian_kl(mean, log_std, reference_mean, reference_log_std)
    assert result.item() == pytest.approx(expected, rel=1e-10)


def test_gaussian_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(diagonal_gaussian_kl, inputs)
    assert torch.autograd.gradgradcheck(diagonal_gaussian_kl, inputs)


def test_gaussian_of_close_narrow_and_wide_policies():
    zero = torch.zeros(1)
    close = diagonal_gaussian_kl(zero, zero + 1e-4, zero, zero)
    assert close.item() == pytest.approx(1e-8, rel=1e-3)  # Δ²
    for log_std in (torch.full((1,), -100.0), torch.full((1,), 100.0)):  # σ and 1/σ² are beyond float32
        assert diagonal_gaussian_kl(zero, log_std, zero, log_std).item() == 0


@settings(max_examples=30)
@given(st.lists(st.floats(-20, 20), min_size=8, max_size=8))
def test_exact_divergences_are_at_least_0_and_0_for_equals(numbers):
    values = torch.tensor(numbers, dtype=torch.float64)
    assert categorical_kl(values[:4], values[4:]) >= -1e-12
    assert categorical_kl(values[:4], values[:4] + 3).abs() < 1e-12
    mean, log_std, reference_mean, reference_log_std = values.reshape(4, 2) / 4
    assert diagonal_gaussian_kl(mean, log_std, reference_mean, reference_log_std) >= -1e-12
    assert diagonal_gaussian_kl(mean, log_std, mean, log_std) == 0
