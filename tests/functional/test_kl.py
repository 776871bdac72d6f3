"""KL estimators by enumeration: every token of a small vocabulary with its probability, nothing sampled."""

import math

import pytest
import torch

from taurl.functional.kl import k1, k2, k3

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
