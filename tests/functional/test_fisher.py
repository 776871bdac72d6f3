"""Products with the Fisher matrix against the matrix itself, summed from the scores of every action."""

import pytest
import torch

from taurl.functional.fisher import output_fisher_vector_product
from taurl.functional.kl import categorical_kl, diagonal_gaussian_kl
from taurl.functional.trust_region import fisher_vector_product

STATES = 7


def policy(outputs: int) -> torch.nn.Sequential:
    torch.manual_seed(outputs)
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)).double()


def matrix(product, parameters) -> torch.Tensor:
    size = sum(parameter.numel() for parameter in parameters)
    return torch.stack([product(unit) for unit in torch.eye(size, dtype=torch.float64)])


def score(logprob: torch.Tensor, parameters) -> torch.Tensor:
    slopes = torch.autograd.grad(logprob, parameters, retain_graph=True)
    return torch.cat([slope.reshape(-1) for slope in slopes])


def test_the_product_of_a_categorical_policy_is_the_expected_square_of_its_scores():
    network, states = policy(3), torch.randn(STATES, 2).double()
    parameters = list(network.parameters())
    outputs = network(states)
    old = outputs.detach()
    product = output_fisher_vector_product(outputs, lambda z: categorical_kl(old, z).mean(), parameters)
    logprobs = network(states).log_softmax(1)
    expected = sum(
        logprobs[state, action].exp().detach() * torch.outer(one := score(logprobs[state, action], parameters), one)
        for state in range(STATES)
        for action in range(3)
    )
    assert torch.allclose(matrix(product, parameters), expected / STATES, rtol=1e-10, atol=1e-12)


def test_the_product_of_a_gaussian_policy_is_that_of_its_closed_form():
    """1/σ² for each mean and 2 for each log σ, through the network's Jacobian."""
    network, states = policy(4), torch.randn(STATES, 2).double()
    parameters = list(network.parameters())
    outputs = network(states)
    old = outputs.detach()

    def divergence(z: torch.Tensor) -> torch.Tensor:
        return diagonal_gaussian_kl(*old.chunk(2, -1), *z.chunk(2, -1)).mean()

    product = output_fisher_vector_product(outputs, divergence, parameters)
    expected = torch.zeros_like(matrix(product, parameters))
    values = network(states)
    for state in range(STATES):
        jacobian = torch.stack([score(values[state, k], parameters) for k in range(4)])
        curvature = torch.cat([torch.exp(-2 * old[state, 2:]), torch.full((2,), 2.0).double()])
        expected += jacobian.T @ torch.diag(curvature) @ jacobian / STATES
    assert torch.allclose(matrix(product, parameters), expected, rtol=1e-10, atol=1e-12)


def test_it_equals_differentiating_the_divergence_twice_and_takes_a_parameter_that_is_not_used():
    network, states = policy(3), torch.randn(STATES, 2).double()
    parameters = [*network.parameters(), torch.zeros(2, dtype=torch.float64, requires_grad=True)]
    outputs = network(states)
    old = outputs.detach()
    one = output_fisher_vector_product(outputs, lambda z: categorical_kl(old, z).mean(), parameters)
    other = fisher_vector_product(categorical_kl(old, network(states)).mean(), parameters)
    vector = torch.randn(sum(parameter.numel() for parameter in parameters)).double()
    assert torch.allclose(one(vector), other(vector), rtol=1e-10, atol=1e-14)
    assert not one(vector)[-2:].any()


def test_a_divergence_for_each_row_and_a_vector_of_another_size_are_refused():
    network, states = policy(3), torch.randn(STATES, 2).double()
    outputs = network(states)
    old = outputs.detach()
    with pytest.raises(ValueError, match="divergence is \\[7\\], expected a scalar"):
        output_fisher_vector_product(outputs, lambda z: categorical_kl(old, z), list(network.parameters()))
    product = output_fisher_vector_product(outputs, lambda z: categorical_kl(old, z).mean(), list(network.parameters()))
    with pytest.raises(ValueError, match="vector \\[3\\]"):
        product(torch.zeros(3))
