"""The trust-region step against explicit matrices, by enumeration and in closed form; its line search by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.kl import categorical_kl, diagonal_gaussian_kl
from taurl.functional.trust_region import (
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    maximum_step,
    trust_region_step,
)

STATES, ACTIONS, FEATURES = 5, 3, 2


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(seed: int, outputs: int, dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    module = torch.nn.Sequential(torch.nn.Linear(FEATURES, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)).to(dtype)
    with torch.no_grad():
        for offset, parameter in enumerate(module.parameters()):
            parameter.copy_(random(seed + offset, *parameter.shape))
    return module


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def matrix(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    return torch.stack([product(unit) for unit in torch.eye(size, dtype=torch.float64)])


class Categorical:
    """A policy over all states, with the surrogate −mean_s Σ_a π(a|s) A(s, a) and the KL from where it started."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.policy = network(seed, ACTIONS, dtype)
        self.parameters = list(self.policy.parameters())
        self.states = random(seed + 50, STATES, FEATURES).to(dtype)
        self.advantages = random(seed + 60, STATES, ACTIONS).to(dtype)
        self.old = self.policy(self.states).detach()

    def surrogate(self) -> Tensor:
        return -(self.policy(self.states).softmax(1) * self.advantages).sum(1).mean()

    def kl(self) -> Tensor:
        return categorical_kl(self.old, self.policy(self.states)).mean()


# Fisher-vector product.


def test_fisher_of_a_categorical_policy_equals_the_enumerated_scores():
    setting = Categorical(1)
    size = sum(parameter.numel() for parameter in setting.parameters)
    explicit = torch.zeros(size, size, dtype=torch.float64)
    for state in range(STATES):
        for action in range(ACTIONS):
            logprob = setting.policy(setting.states)[state].log_softmax(0)[action]
            score = flat(torch.autograd.grad(logprob, setting.parameters))
            explicit += logprob.exp().item() / STATES * torch.outer(score, score)
    actual = matrix(fisher_vector_product(setting.kl(), setting.parameters), size)
    torch.testing.assert_close(actual, explicit, rtol=1e-10, atol=1e-13)


def test_fisher_of_a_gaussian_policy_equals_the_closed_form():
    """Linear mean W s with a log-std of its own: Cov(s) ⊗ diag(1/σ²) for W, 2 for each log-std, nothing between."""
    weight, log_std, states = random(2, 2, FEATURES), random(3, 2), random(4, STATES, FEATURES)
    parameters = [weight.requires_grad_(), log_std.requires_grad_()]
    mean = states @ weight.T
    spread = log_std.expand(STATES, 2)
    kl = diagonal_gaussian_kl(mean.detach(), spread.detach(), mean, spread).mean()
    actual = matrix(fisher_vector_product(kl, parameters), 6)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for dimension in range(2):
        for i in range(FEATURES):
            for j in range(FEATURES):
                second = sum((states[n, i] * states[n, j]).item() for n in range(STATES)) / STATES
                variance = math.exp(2 * log_std[dimension].item())
                expected[2 * dimension + i, 2 * dimension + j] = second / variance
        expected[4 + dimension, 4 + dimension] = 2
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_fisher_has_zeros_for_parameters_that_the_policy_does_not_use():
    setting = Categorical(5)
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    alone = fisher_vector_product(setting.kl(), setting.parameters)
    with_unused = fisher_vector_product(setting.kl(), [unused, *setting.parameters])
    vector = random(6, sum(parameter.numel() for parameter in setting.parameters))
    result = with_unused(torch.cat([torch.ones(3, dtype=torch.float64), vector]))
    assert torch.equal(result, torch.cat([torch.zeros(3, dtype=torch.float64), alone(vector)]))
    assert not result.requires_grad
    with pytest.raises(ValueError, match="expected one shape"):
        alone(vector[:-1])
    with pytest.raises(ValueError, match="expected a scalar"):
        fisher_vector_product(categorical_kl(setting.old, setting.policy(setting.states)), setting.parameters)


# Conjugate gradient.


def spd(seed: int, size: int, smallest: float = 0.1) -> Tensor:
    square = random(seed, size, size)
    return square @ square.T + smallest * torch.eye(size, dtype=torch.float64)


def test_conjugate_gradient_of_a_hand_worked_system():
    """[[2, 0], [0, 1]] x = (1, 1): first step 2/3 along b, then exact."""
    system, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double(), torch.ones(2).double()
    first = conjugate_gradient(system.mv, target, iterations=1)
    torch.testing.assert_close(first.vector, torch.tensor([2 / 3, 2 / 3]).double())
    assert first.residual == pytest.approx(1 / 3)  # b − A x = (−1/3, 1/3)
    second = conjugate_gradient(system.mv, target, iterations=2)
    torch.testing.assert_close(second.vector, torch.tensor([0.5, 1.0]).double())
    assert second.residual < 1e-12


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(-30, 30))
def test_conjugate_gradient_solves_random_systems(seed, size, exponent):
    system, target = spd(seed, size), random(seed + 1, size) * 10.0**exponent
    vector, residual = conjugate_gradient(system.mv, target, iterations=10 * size, tolerance=1e-12)
    expected = torch.linalg.solve(system, target)
    assert (vector - expected).norm() <= 1e-8 * expected.norm()
    actual = (target - system @ vector).norm() / target.norm()
    assert abs(actual.item() - residual) < 1e-9


def test_conjugate_gradient_stops_at_the_tolerance_and_at_its_iterations():
    products = []

    def product(vector: Tensor) -> Tensor:
        products.append(vector)
        return system @ vector

    system, target = torch.diag(torch.arange(1.0, 31).double()), torch.ones(30).double()
    rough = conjugate_gradient(product, target, iterations=100, tolerance=0.3)
    used = len(products)
    assert rough.residual <= 0.3
    assert conjugate_gradient(product, target, iterations=used - 1, tolerance=0.3).residual > 0.3
    assert len(products) == 2 * used - 1


def test_conjugate_gradient_of_nothing():
    def product(vector: Tensor) -> Tensor:
        raise AssertionError("no product is needed")

    for target in (torch.zeros(3), torch.zeros(0)):
        vector, residual = conjugate_gradient(product, target)
        assert torch.equal(vector, torch.zeros_like(target))
        assert residual == 0
    for bad in (math.nan, math.inf):
        vector, residual = conjugate_gradient(product, torch.tensor([1.0, bad]))
        assert torch.equal(vector, torch.zeros(2))
        assert math.isnan(residual)


def test_conjugate_gradient_keeps_what_it_has_where_the_curvature_ends():
    singular, target = torch.diag(torch.tensor([2.0, 1.0, 0.0])), torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(conjugate_gradient(singular.mv, target).vector, torch.tensor([0.5, 1.0, 0.0]))
    unreachable = conjugate_gradient(singular.mv, torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(unreachable.vector, torch.zeros(3))
    assert unreachable.residual == 1
    broken = conjugate_gradient(lambda vector: vector * math.nan, torch.ones(2))
    assert torch.equal(broken.vector, torch.zeros(2))


def test_numbers_at_the_edge_of_float32_and_half_precision():
    system = spd(9, 4).float()
    for scale in (1e-30, 1e30):
        target = random(10, 4).float() * scale
        vector = conjugate_gradient(system.mv, target, iterations=20).vector
        torch.testing.assert_close(vector, torch.linalg.solve(system, target), rtol=1e-3, atol=0)
        step = maximum_step(system.mv, vector, max_kl=0.01)
        assert (step @ system @ step / 2).item() == pytest.approx(0.01, rel=1e-4)
    assert conjugate_gradient(system.mv, torch.ones(4).bfloat16()).vector.dtype == torch.float32


# Step length and line search.


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(1e-4, 1.0))
def test_the_maximum_step_ends_where_the_quadratic_model_is_delta(seed, max_kl):
    system, direction = spd(seed, 5), random(seed + 1, 5)
    step = maximum_step(system.mv, direction, max_kl=max_kl)
    assert (step @ system @ step / 2).item() == pytest.approx(max_kl, rel=1e-9)
    assert torch.cosine_similarity(step, direction, dim=0).item() == pytest.approx(1, abs=1e-12)


def test_the_maximum_step_of_a_direction_that_leads_nowhere_is_zero():
    for direction in (torch.zeros(2), torch.zeros(0), torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0])):
        assert torch.equal(maximum_step(lambda vector: vector, direction, max_kl=0.1), torch.zeros_like(direction))
    assert torch.equal(maximum_step(torch.zeros_like, torch.ones(2), max_kl=0.1), torch.zeros(2))


def parabola(parameter: Tensor) -> Tensor:
    return (parameter**2).sum()


def test_line_search_takes_the_longest_step_that_satisfies_both():
    """From 1 with step −4: f(1 − 4α^k) < f(1) = 1 first at α = ½, k = 2 (to 0); with |Δ| ≤ 0.6 as the KL at k = 3."""
    parameter = torch.tensor([1.0], requires_grad=True)
    step = torch.tensor([-4.0])

    def distance() -> Tensor:
        return (parameter - 1).abs().sum()

    free = backtracking_line_search(lambda: parabola(parameter), distance, [parameter], step, max_kl=9.0, shrink=0.5)
    assert free == (True, 0.25, 1.0, 1.0)
    assert parameter.item() == 0
    with torch.no_grad():
        parameter.fill_(1.0)
    bound = backtracking_line_search(lambda: parabola(parameter), distance, [parameter], step, max_kl=0.6, shrink=0.5)
    assert bound == (True, 0.125, 0.5, 0.75)
    assert parameter.item() == 0.5
    assert parameter.requires_grad
    assert parameter.grad is None


def odd_parameters() -> list[Tensor]:
    """Numbers that x + s − s would not give back."""
    return [
        torch.tensor([[1e-30, -0.0], [0.1, 1e10]], requires_grad=True),
        torch.tensor(0.3, dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([math.pi], dtype=torch.float64, requires_grad=True),
    ]


def bits(parameters: list[Tensor]) -> list[list[int]]:
    return [parameter.detach().reshape(-1).view(torch.uint8).tolist() for parameter in parameters]


@pytest.mark.parametrize("after", [1.0, 0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("divergence", [0.0, 0.02, math.nan, math.inf])
def test_line_search_restores_every_bit_when_nothing_helps(after, divergence):
    parameters = odd_parameters()
    before, storages = bits(parameters), [parameter.data_ptr() for parameter in parameters]
    calls = []

    def surrogate() -> Tensor:
        calls.append(bits(parameters))
        return torch.tensor(0.0 if len(calls) == 1 else after)

    result = backtracking_line_search(
        surrogate, lambda: torch.tensor(divergence), parameters, torch.full((6,), 0.7), max_kl=0.01, tries=4
    )
    assert result == (False, 0.0, 0.0, 0.0)
    assert len(calls) == 5
    assert calls[0] == before
    assert all(call != before for call in calls[1:])
    assert bits(parameters) == before
    assert [parameter.data_ptr() for parameter in parameters] == storages


def test_line_search_refuses_an_improvement_beyond_the_divergence():
    parameters = odd_parameters()
    before, values = bits(parameters), iter([0.0, -1.0, -1.0, -1.0])
    result = backtracking_line_search(
        lambda: torch.tensor(next(values)),
        lambda: torch.tensor(0.02),
        parameters,
        torch.full((6,), 0.7),
        max_kl=0.01,
        tries=3,
    )
    assert not result.accepted
    assert bits(parameters) == before


def test_line_search_restores_when_a_closure_raises():
    parameters = odd_parameters()
    before = bits(parameters)

    def fails() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        backtracking_line_search(lambda: torch.zeros(()), fails, parameters, torch.ones(6), max_kl=0.01)
    assert bits(parameters) == before


# The whole step.


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.01, 0.1, 1.0]), st.sampled_from([0.0, 1e-3, 0.1]))
def test_a_step_improves_within_delta(seed, max_kl, damping):
    setting = Categorical(seed)
    before = setting.surrogate().item()
    result = trust_region_step(
        setting.surrogate, setting.kl, setting.parameters, max_kl=max_kl, damping=damping, tries=30
    )
    assert result.accepted
    assert 0 < result.fraction <= 1
    assert setting.kl().item() == pytest.approx(result.kl, abs=1e-12)
    assert result.kl <= max_kl
    assert result.improvement > 0
    assert before - setting.surrogate().item() == pytest.approx(result.improvement, rel=1e-9)
    assert all(parameter.grad is None for parameter in setting.parameters)


def test_a_short_step_uses_up_its_divergence_along_the_natural_gradient():
    setting = Categorical(11)
    size = sum(parameter.numel() for parameter in setting.parameters)
    start = flat(setting.parameters)
    fisher = matrix(fisher_vector_product(setting.kl(), setting.parameters), size)
    gradient = flat(torch.autograd.grad(setting.surrogate(), setting.parameters))
    natural = -torch.linalg.solve(fisher + 1e-3 * torch.eye(size, dtype=torch.float64), gradient)
    result = trust_region_step(
        setting.surrogate, setting.kl, setting.parameters, max_kl=1e-8, damping=1e-3, iterations=200, tolerance=1e-12
    )
    moved = flat(setting.parameters) - start
    assert torch.cosine_similarity(moved, natural, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert 0.8 * 1e-8 < result.kl <= 1e-8
    assert result.residual < 1e-10


def test_gaussian_policy_with_its_own_log_std():
    states, actions, advantages = random(12, 40, FEATURES), random(13, 40, 2), random(14, 40)
    policy = network(15, 2)
    log_std = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    parameters = [*policy.parameters(), log_std]

    def distribution() -> tuple[Tensor, Tensor]:
        return policy(states), log_std.expand(40, 2)

    old_mean, old_log_std = (each.detach() for each in distribution())

    def logprobs() -> Tensor:
        mean, spread = distribution()
        return (-(((actions - mean) / spread.exp()) ** 2) / 2 - spread).sum(1)

    old_logprobs = logprobs().detach()
    result = trust_region_step(
        lambda: -((logprobs() - old_logprobs).exp() * advantages).mean(),
        lambda: diagonal_gaussian_kl(old_mean, old_log_std, *distribution()).mean(),
        parameters,
        max_kl=0.01,
    )
    assert result.accepted
    assert 0.001 < result.kl <= 0.01
    assert (log_std != 0).all()


@pytest.mark.parametrize("scale", [0.03, 20.0])
def test_the_natural_gradient_does_not_depend_on_the_parametrization(scale):
    """logits = (c ∘ V) s for V = W / c moves π as logits = W s does; the plain gradient does not."""
    weight, states = random(16, ACTIONS, FEATURES), random(17, STATES, FEATURES)
    advantages = random(18, STATES, ACTIONS)
    scales = torch.tensor([[1.0, scale], [scale, 1.0], [1 / scale, scale]], dtype=torch.float64)

    def moved(factors: Tensor, *, natural: bool) -> Tensor:
        parameter = (weight / factors).requires_grad_()
        old = states @ weight.T

        def logits() -> Tensor:
            return states @ (factors * parameter).T

        def surrogate() -> Tensor:
            return -(logits().softmax(1) * advantages).sum(1).mean()

        def kl() -> Tensor:
            return categorical_kl(old, logits()).mean()

        if natural:
            result = trust_region_step(
                surrogate, kl, [parameter], max_kl=0.02, damping=0.0, iterations=200, tolerance=1e-13
            )
            assert result.accepted
        else:
            (gradient,) = torch.autograd.grad(surrogate(), parameter)
            with torch.no_grad():
                parameter -= 0.1 * gradient
        return logits().detach().softmax(1)

    plain = torch.ones_like(scales)
    torch.testing.assert_close(moved(scales, natural=True), moved(plain, natural=True), rtol=1e-6, atol=1e-8)
    assert (moved(scales, natural=False) - moved(plain, natural=False)).abs().max() > 1e-3


@pytest.mark.parametrize("advantage", [0.0, math.nan])
def test_without_a_gradient_nothing_moves(advantage):
    setting = Categorical(19)
    setting.advantages = torch.full_like(setting.advantages, advantage)
    before = bits(setting.parameters)
    result = trust_region_step(setting.surrogate, setting.kl, setting.parameters, max_kl=0.01)
    assert result[:4] == (False, 0.0, 0.0, 0.0)
    assert result.residual == 0 or math.isnan(advantage)
    assert bits(setting.parameters) == before


def test_the_scale_of_the_advantages_does_not_matter():
    results = []
    for scale in (1e-20, 1.0, 1e20):
        setting = Categorical(20, torch.float32)
        setting.advantages *= scale
        assert trust_region_step(setting.surrogate, setting.kl, setting.parameters, max_kl=0.01).accepted
        results.append(flat(setting.parameters))
    for result in results:
        torch.testing.assert_close(result, results[1], rtol=1e-3, atol=1e-4)


def test_a_step_repeats_exactly():
    first, second = Categorical(21), Categorical(21)
    for setting in (first, second):
        torch.rand(1)  # whatever state the global generator is in
        trust_region_step(setting.surrogate, setting.kl, setting.parameters, max_kl=0.01)
    assert bits(first.parameters) == bits(second.parameters)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_kl": 0.0},
        {"max_kl": math.nan},
        {"damping": -0.1},
        {"iterations": 0},
        {"tolerance": -1.0},
        {"shrink": 1.0},
        {"shrink": 0.0},
        {"tries": 0},
        {"parameters": []},
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_change_nothing(wrong):
    setting = Categorical(22)
    before = bits(setting.parameters)
    with pytest.raises(ValueError, match=rf"\b{next(iter(wrong))}\b.*expected"):
        trust_region_step(
            **{
                "surrogate": setting.surrogate,
                "kl": setting.kl,
                "parameters": setting.parameters,
                "max_kl": 0.01,
                **wrong,
            }
        )
    assert bits(setting.parameters) == before


def test_bad_shapes_raise():
    setting = Categorical(23)
    with pytest.raises(ValueError, match="surrogate is \\[5\\], expected a scalar"):
        trust_region_step(lambda: setting.policy(setting.states)[:, 0], setting.kl, setting.parameters, max_kl=0.01)
    with pytest.raises(ValueError, match="step is \\[3\\], expected"):
        backtracking_line_search(setting.surrogate, setting.kl, setting.parameters, torch.ones(3), max_kl=0.01)
    with pytest.raises(ValueError, match="target \\[2, 2\\]"):
        conjugate_gradient(lambda vector: vector, torch.ones(2, 2))
