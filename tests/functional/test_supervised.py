"""Losses of supervised fine-tuning through the chunked head, against torch's own and loops over dense logits."""

import math

import pytest
import torch

from taurl.functional.logprobs import score_tokens
from taurl.functional.supervised import dft_loss, nll_loss, smoothed_loss, z_loss

N, D, V = 9, 4, 7


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    return draw(N, D), draw(V, D), draw(V), torch.randint(V, (N,), generator=generator)


def scores_and_logits(inputs, softcap=None, temperature=1.0):
    hidden, weight, bias, tokens = inputs
    logits = hidden @ weight.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    options = {"bias": bias, "softcap": softcap, "temperature": temperature}
    return score_tokens(hidden, weight, tokens, **options, rows_per_chunk=4), logits / temperature


def assert_same(inputs, found, expected):
    """Values, and gradients of a sum that weighs each token differently."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = torch.arange(1, N + 1, dtype=torch.float64)
    leaves = inputs[:3]
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), leaves, retain_graph=True),
        strict=True,
    )
    for gradient, other in pairs:
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-12)


CAPS = [{}, {"softcap": 2.0}, {"softcap": 1.5, "temperature": 0.7}]


@pytest.mark.parametrize("options", CAPS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_equals_torchs(inputs, options, smoothing):
    scores, logits = scores_and_logits(inputs, **options)
    expected = torch.nn.functional.cross_entropy(logits, inputs[3], reduction="none", label_smoothing=smoothing)
    assert_same(inputs, smoothed_loss(scores.logprobs, scores.mean_logprobs, label_smoothing=smoothing), expected)
    if smoothing == 0:
        assert_same(inputs, nll_loss(scores.logprobs), expected)


@pytest.mark.parametrize("options", CAPS)
def test_z_loss_equals_a_loop(inputs, options):
    scores, logits = scores_and_logits(inputs, **options)
    assert_same(inputs, z_loss(scores.log_normalizers, coefficient=0.3), 0.3 * logits.logsumexp(1) ** 2)
    for row in range(N):
        total = math.log(math.fsum(math.exp(z) for z in logits[row].tolist()))
        assert scores.log_normalizers[row].item() == pytest.approx(total, rel=1e-12)


def test_the_gradient_of_dft_is_that_of_minus_the_probability(inputs):
    scores, logits = scores_and_logits(inputs)
    losses = dft_loss(scores.logprobs)
    probabilities = logits.softmax(1)[range(N), inputs[3]]
    torch.testing.assert_close(losses, -probabilities * probabilities.log(), rtol=1e-12, atol=0)
    found = torch.autograd.grad(losses.sum(), inputs[:3], retain_graph=True)
    expected = torch.autograd.grad(-probabilities.sum(), inputs[:3])
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-13)


def test_everything_at_once_equals_finite_differences(inputs):
    tokens = inputs[3]

    def function(hidden, weight, bias):
        scores = score_tokens(hidden, weight, tokens, bias=bias, softcap=3.0, temperature=1.3, rows_per_chunk=2)
        return scores[:4]

    assert torch.autograd.gradcheck(function, inputs[:3])


@pytest.mark.parametrize("output", [2, 3])
def test_one_score_alone_has_the_gradient_of_its_definition(inputs, output):
    scores, logits = scores_and_logits(inputs)
    expected = logits.logsumexp(1) if output == 2 else logits.log_softmax(1).mean(1)
    assert_same(inputs, scores[output], expected)


def test_the_largest_logit_is_known_for_what_it_is(inputs):
    scores, logits = scores_and_logits(inputs)
    assert scores.is_largest.tolist() == (logits.argmax(1) == inputs[3]).tolist()
    assert not scores.is_largest.requires_grad
    best = (*inputs[:3], logits.argmax(1))
    assert scores_and_logits(best)[0].is_largest.all()


def test_a_forbidden_token_has_a_mean_of_minus_infinity_and_spoils_nothing_else(inputs):
    hidden, weight, bias, tokens = inputs
    bias = bias.detach().index_fill(0, torch.tensor([V - 1]), -math.inf)
    scores = score_tokens(hidden, weight, tokens.clamp(max=V - 2), bias=bias)
    assert scores.mean_logprobs.isneginf().all()
    losses = smoothed_loss(scores.logprobs, scores.mean_logprobs, label_smoothing=0.0)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), (hidden, weight)))


def test_half_precision_is_widened():
    values = torch.tensor([-0.5, -3.0], dtype=torch.bfloat16)
    for loss in (nll_loss(values), dft_loss(values), z_loss(values, coefficient=1e-4)):
        assert loss.dtype == torch.float32


def test_bad_numbers_are_named():
    values = torch.zeros(3)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5"):
        smoothed_loss(values, values, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"mean_logprobs \[2\]"):
        smoothed_loss(values, values[:2], label_smoothing=0.1)
    with pytest.raises(ValueError, match="coefficient is -1"):
        z_loss(values, coefficient=-1)


def test_a_token_of_probability_zero_costs_dynamic_fine_tuning_nothing():
    logprobs = torch.tensor([-math.inf, -1.0], requires_grad=True)
    losses = dft_loss(logprobs)
    assert losses.tolist() == [0.0, pytest.approx(math.exp(-1))]
    assert torch.autograd.grad(losses.sum(), logprobs)[0].tolist() == [0.0, pytest.approx(-math.exp(-1))]
