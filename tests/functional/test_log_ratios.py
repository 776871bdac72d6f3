"""Numbers per completion: sums, LD-DPO's weighted sums, and what an f-divergence makes of a log-ratio."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taurl.functional.log_ratios import (
    divergence_scores,
    implicit_rewards,
    length_desensitized_logprobs,
    sequence_logprobs,
)

NAN = math.nan
# f with f(1) = 0, of D_f(π ‖ π_ref) = E_ref f(π/π_ref); each from the paper's table, up to multiples of u − 1
GENERATORS = {
    "reverse_kl": lambda u, a: u * math.log(u),
    "js_divergence": lambda u, a: u * math.log(u) - (1 + u) * math.log((1 + u) / 2),
    "forward_kl": lambda u, a: -math.log(u),
    "alpha_divergence": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}


def token_example() -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.tensor([[NAN, -1.0, -2.0, -4.0, -8.0], [-1.0, -2.0, NAN, math.inf, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    return logprobs, mask


def test_sums_by_hand_and_what_is_masked():
    logprobs, mask = token_example()
    logprobs.requires_grad_()
    sums = sequence_logprobs(logprobs, mask)
    assert sums.tolist() == [-15.0, -3.0]
    sums.sum().backward()
    assert torch.equal(logprobs.grad, mask.double())
    assert sequence_logprobs(logprobs, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_length_desensitized_by_hand():
    logprobs, mask = token_example()
    logprobs.requires_grad_()
    result = length_desensitized_logprobs(logprobs, mask, torch.tensor([2, 2]), alpha=0.25)
    assert result.tolist() == [-1 - 2 - 0.25 * 12, -3.0]
    result.sum().backward()
    assert logprobs.grad.tolist() == [[0, 1, 1, 0.25, 0.25], [1, 1, 0, 0, 0]]


@given(st.integers(0, 100), st.floats(0, 1))
def test_length_desensitized_between_cut_and_plain(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(4, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    public = torch.randint(0, 7, (4,), generator=generator)
    plain = length_desensitized_logprobs(logprobs, mask, public, alpha=1.0)
    assert torch.allclose(plain, sequence_logprobs(logprobs, mask), rtol=1e-14)
    result = length_desensitized_logprobs(logprobs, mask, public, alpha=alpha)
    for row in range(4):
        tokens = [logprobs[row, t].item() for t in range(6) if mask[row, t]]
        expected = sum((1.0 if n < public[row] else alpha) * token for n, token in enumerate(tokens))
        assert result[row].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_implicit_rewards():
    logprobs = torch.tensor([-3.0, -5.0], requires_grad=True)
    rewards = implicit_rewards(logprobs, torch.tensor([-5.0, -4.0]), beta=0.5)
    assert rewards.tolist() == [1.0, -0.5]
    assert not rewards.requires_grad


@pytest.mark.parametrize("divergence", GENERATORS)
@given(x=st.floats(-3, 3), alpha=st.floats(0.1, 0.9))
def test_scores_are_derivatives_of_the_generator(divergence, x, alpha):
    def slope(u: float, step: float = 1e-5) -> float:
        f = GENERATORS[divergence]
        return (f(u + step * u, alpha) - f(u - step * u, alpha)) / (2 * step * u)

    score = divergence_scores(torch.tensor([x], dtype=torch.float64), divergence, alpha=alpha).item()
    assert score == pytest.approx(slope(math.exp(x)) - slope(1.0), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("divergence", GENERATORS)
def test_a_policy_is_optimal_for_the_reward_that_its_scores_say(divergence):
    """E_π r − β D_f(π ‖ π_ref) with r = β · score is stationary at π: the claim f-DPO rests on."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.randn(5, dtype=torch.float64, generator=generator).softmax(0)
    policy, beta, alpha = logits.softmax(0), 0.7, 0.3
    reward = beta * divergence_scores((policy / reference).log(), divergence, alpha=alpha).detach()
    u = policy / reference
    values = {
        "reverse_kl": u * u.log(),
        "js_divergence": u * u.log() - (1 + u) * ((1 + u) / 2).log(),
        "forward_kl": -u.log(),
        "alpha_divergence": (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
    }[divergence]
    objective = (policy * reward).sum() - beta * (reference * values).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    assert gradient.abs().max() < 1e-14
    (of_reward,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    assert of_reward.abs().max() > 1e-2  # so the zero above is a balance


def test_limits_of_the_alpha_divergence():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert torch.equal(divergence_scores(x, "reverse_kl"), x)
    assert torch.equal(divergence_scores(x, "alpha_divergence", alpha=0.0), x)
    torch.testing.assert_close(divergence_scores(x, "alpha_divergence", alpha=1e-9), x, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(divergence_scores(x, "alpha_divergence", alpha=1.0), divergence_scores(x, "forward_kl"))


@pytest.mark.parametrize("divergence", GENERATORS)
def test_scores_have_the_right_gradient_and_stay_finite(divergence):
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence_scores(x, divergence, alpha=0.3), x)
    far = torch.tensor([-1e4, -1e-6, 0.0, 1e-6, 1e4], requires_grad=True)
    scores = divergence_scores(far, divergence)
    assert scores.square().isfinite().all()
    assert scores[2] == 0
    slope = 0.5 if divergence == "js_divergence" else 1.0
    assert scores[3].item() == pytest.approx(slope * 1e-6, rel=1e-1 if divergence == "js_divergence" else 1e-5)
    assert (scores.diff() >= 0).all()
    scores.sum().backward()
    assert far.grad.isfinite().all()
    assert divergence_scores(torch.zeros(1).bfloat16(), divergence).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_alpha_overflows_at_very_unlikely_answers(dtype):
    """−(e^(−αx) − 1)/α is bounded, and its square, whatever α divides by."""
    far = torch.tensor([-1e38, -1e6, -1e4, -300.0, -1.0, 1e4], dtype=dtype, requires_grad=True)
    for alpha in (1.0, 0.5, 1e-2, 1e-3, 1e-6, 1e-12, 1e-30, 1e-45, 1e-300):
        scores = divergence_scores(far, "alpha_divergence", alpha=alpha)
        assert scores.dtype == dtype
        assert scores.square().isfinite().all()
        assert (scores[:5].diff() >= 0).all()
        (gradient,) = torch.autograd.grad(scores.sum(), far)
        assert gradient.isfinite().all()
    # below the bound it is the formula: α = 10⁻³ at −300 and −10⁴
    exact = [-(math.exp(0.3) - 1) / 1e-3, -(math.exp(10) - 1) / 1e-3]
    scores = divergence_scores(far, "alpha_divergence", alpha=1e-3)
    assert scores[[3, 2]].tolist() == pytest.approx(exact, rel=1e-6)
    # at the bound it is the same for every α
    for alpha in (1.0, 0.5, 1e-2):
        assert divergence_scores(far, "alpha_divergence", alpha=alpha)[0].item() == pytest.approx(
            -(torch.finfo(dtype).max ** 0.45), rel=1e-6
        )
    # float64 reaches much further before it stops
    wide = torch.tensor([-60.0, -300.0], dtype=torch.float64)
    assert divergence_scores(wide, "forward_kl").tolist() == pytest.approx([-math.exp(60), -math.exp(300)], rel=1e-12)


def test_bad_input_is_named():
    tokens, mask, rows = torch.zeros(2, 3), torch.ones(2, 3).bool(), torch.zeros(2)
    with pytest.raises(ValueError, match="boolean mask"):
        sequence_logprobs(tokens, mask.float())
    with pytest.raises(ValueError, match="expected one shape"):
        sequence_logprobs(tokens[:, :2], mask)
    with pytest.raises(ValueError, match=r"public_lengths \[1\]"):
        length_desensitized_logprobs(tokens, mask, torch.tensor([1]), alpha=1)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        length_desensitized_logprobs(tokens, mask, torch.tensor([1, 1]), alpha=1.5)
    with pytest.raises(ValueError, match=r"alpha is -0\.5"):
        divergence_scores(rows, "alpha_divergence", alpha=-0.5)
    with pytest.raises(ValueError, match="divergence is 'js'"):
        divergence_scores(rows, "js")
    with pytest.raises(ValueError, match="beta is 0"):
        implicit_rewards(rows, rows, beta=0)
