"""What each KL term descends, by enumeration of a small autoregressive policy in float64: nothing is sampled.

Vocabulary 3, token 0 ends the sequence, 3 tokens at most: 15 sequences of 1 to 3 tokens, 7 states, one row of logits
for each state, so that every policy on them is covered. Padding holds NaN throughout.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.importance import LARGEST_LOG_RATIO
from taurl.functional.kl import KL_GRADIENT_CONDITIONS, KL_GRADIENTS, kl_loss, kl_penalty, kl_ratios

END, VOCABULARY, LONGEST = 0, 3, 3


def sequences(prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for token in range(VOCABULARY):
        sequence = (*prefix, token)
        if token == END or len(sequence) == LONGEST:
            yield sequence
        else:
            yield from sequences(sequence)


SEQUENCES = list(sequences())
PREFIXES = sorted({sequence[:t] for sequence in SEQUENCES for t in range(len(sequence))})
TOKENS = torch.tensor([[*sequence, *[0] * (LONGEST - len(sequence))] for sequence in SEQUENCES])
MASK = torch.tensor([[t < len(sequence) for t in range(LONGEST)] for sequence in SEQUENCES])
STATES = torch.tensor([[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(LONGEST)] for s in SEQUENCES])

Logits = Tensor  # [7, 3]
Gradient = Callable[[Logits, Logits, Logits], Tensor]


def random_logits(seed: int, scale: float = 1.0) -> Logits:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=generator)


POLICY, REFERENCE, SAMPLER = random_logits(0), random_logits(1), random_logits(2)


def logprobs_of(logits: Logits) -> Tensor:
    return torch.where(MASK, logits.log_softmax(1)[STATES, TOKENS], math.nan)


def total(values: Tensor) -> Tensor:
    return torch.where(MASK, values, 0.0).sum(1)


def probabilities(logits: Logits) -> Tensor:
    return total(logprobs_of(logits)).exp()


def gradient_at(policy: Logits, value: Callable[[Logits], Tensor]) -> Tensor:
    logits = policy.clone().requires_grad_()
    return torch.autograd.grad(value(logits), logits)[0]


# The exact right-hand sides, from sums over all sequences or states.


def divergence(first: Logits, second: Logits) -> Tensor:
    return (probabilities(first) * total(logprobs_of(first) - logprobs_of(second))).sum()


def forward(policy: Logits, reference: Logits, _: Logits) -> Tensor:
    return gradient_at(policy, lambda logits: divergence(logits, reference))


def reverse(policy: Logits, reference: Logits, _: Logits) -> Tensor:
    return gradient_at(policy, lambda logits: divergence(reference, logits))


def visits(logits: Logits) -> Tensor:
    """How probable it is to come through each state."""
    logprobs = logits.log_softmax(1)
    steps = [[logprobs[PREFIXES.index(p[:t]), p[t]].item() for t in range(len(p))] for p in PREFIXES]
    return torch.tensor([math.exp(sum(step)) for step in steps], dtype=torch.float64)


def state_divergences(first: Logits, second: Logits) -> Tensor:
    return (first.softmax(1) * (first.log_softmax(1) - second.log_softmax(1))).sum(1)


def local_forward(policy: Logits, reference: Logits, visited: Logits) -> Tensor:
    return gradient_at(policy, lambda logits: (visits(visited) * state_divergences(logits, reference)).sum())


def local_reverse(policy: Logits, reference: Logits, visited: Logits) -> Tensor:
    return gradient_at(policy, lambda logits: (visits(visited) * state_divergences(reference, logits)).sum())


def second_moment(policy: Logits, reference: Logits, level: str) -> Tensor:
    def value(logits: Logits) -> Tensor:
        log_ratios = logprobs_of(logits) - logprobs_of(reference)
        squares = total(log_ratios**2) if level == "token" else total(log_ratios) ** 2
        return (probabilities(logits) * squares / 2).sum()

    return gradient_at(policy, value)


EXPECTED: dict[tuple[str, str, str], Gradient] = {
    ("k1", "reward", "token"): forward,
    ("k1", "reward", "sequence"): forward,
    ("k2", "reward", "token"): lambda p, r, s: second_moment(p, r, "token") - local_forward(p, r, p),
    ("k2", "reward", "sequence"): lambda p, r, s: second_moment(p, r, "sequence") - forward(p, r, s),
    ("k3", "reward", "token"): lambda p, r, s: forward(p, r, s) - local_reverse(p, r, p),
    ("k3", "reward", "sequence"): lambda p, r, s: forward(p, r, s) - reverse(p, r, s),
    ("k1", "loss", "token"): lambda p, r, s: torch.zeros_like(p),
    ("k1", "loss", "sequence"): lambda p, r, s: torch.zeros_like(p),
    ("k2", "loss", "token"): lambda p, r, s: local_forward(p, r, p),
    ("k2", "loss", "sequence"): forward,
    ("k3", "loss", "token"): lambda p, r, s: local_reverse(p, r, p),
    ("k3", "loss", "sequence"): reverse,
    ("k1", "weighted_loss", "token"): forward,
    ("k1", "weighted_loss", "sequence"): forward,
    ("k2", "weighted_loss", "token"): lambda p, r, s: local_forward(p, r, p),
    ("k2", "weighted_loss", "sequence"): forward,
    ("k3", "weighted_loss", "token"): forward,
    ("k3", "weighted_loss", "sequence"): forward,
}

# The left-hand sides: the expectation of what autograd makes of the functions under test.


def token_ratios(logits: Logits, sampler: Logits) -> Tensor:
    return (logprobs_of(logits) - logprobs_of(sampler)).exp()


def prefix_ratios(logits: Logits, sampler: Logits) -> Tensor:
    return torch.where(MASK, token_ratios(logits, sampler), 1.0).cumprod(1)


def whole_ratios(logits: Logits, sampler: Logits) -> Tensor:
    return (probabilities(logits) / probabilities(sampler))[:, None].expand_as(MASK)


def penalized(
    policy: Logits, reference: Logits, *, estimator: str = "k1", level: str = "token", weights: Tensor | None = None
) -> Tensor:
    """Gradient of −Σ_t A_t log π with the advantages −penalty, expected over sequences of π, or as weighted."""

    def value(logits: Logits) -> Tensor:
        logprobs = logprobs_of(logits)
        penalty = kl_penalty(logprobs, logprobs_of(reference), MASK, estimator=estimator, level=level)
        scores = torch.where(MASK, penalty * logprobs, 0.0)
        return ((probabilities(policy)[:, None] if weights is None else weights) * scores).sum()

    return gradient_at(policy, value)


def as_loss(
    policy: Logits, reference: Logits, *, estimator: str, level: str, sampler: Logits | None = None, ratios=None
) -> Tensor:
    def value(logits: Logits) -> Tensor:
        losses = kl_loss(
            logprobs_of(logits),
            logprobs_of(reference),
            MASK,
            estimator=estimator,
            level=level,
            ratios=None if ratios is None else ratios(logits, sampler),
        )
        return (probabilities(policy if sampler is None else sampler) * losses.sum(1)).sum()

    return gradient_at(policy, value)


def obtained(key: tuple[str, str, str], policy: Logits, reference: Logits, sampler: Logits) -> Tensor:
    estimator, place, level = key
    if place == "reward":
        return penalized(policy, reference, estimator=estimator, level=level)
    if place == "loss":
        return as_loss(policy, reference, estimator=estimator, level=level)

    def ratios(logits: Logits, sampler: Logits) -> Tensor:
        return kl_ratios(logprobs_of(logits), logprobs_of(sampler), MASK, level=level)

    return as_loss(policy, reference, estimator=estimator, level=level, sampler=sampler, ratios=ratios)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_the_enumeration_is_complete():
    assert len(SEQUENCES) == 15
    assert len(PREFIXES) == 7
    assert sorted(set(MASK.sum(1).tolist())) == [1, 2, 3]
    assert probabilities(POLICY).sum().item() == pytest.approx(1, rel=1e-14)
    by_states = (visits(POLICY) * state_divergences(POLICY, REFERENCE)).sum()
    assert divergence(POLICY, REFERENCE).item() == pytest.approx(by_states.item(), rel=1e-13)


@pytest.mark.parametrize("key", KL_GRADIENTS, ids="-".join)
def test_every_row_of_the_table(key):
    assert_equal(obtained(key, POLICY, REFERENCE, SAMPLER), EXPECTED[key](POLICY, REFERENCE, SAMPLER))


@pytest.mark.parametrize(("level", "reference"), [("token", prefix_ratios), ("sequence", whole_ratios)])
def test_kl_ratios_are_products_of_probabilities_in_value_and_gradient(level, reference):
    """Padding holds NaN on both sides of `kl_ratios`."""

    def weighed(ratios: Tensor) -> Tensor:
        return (torch.arange(1.0, ratios.numel() + 1).reshape(ratios.shape) * torch.where(MASK, ratios, 0.0)).sum()

    def found(logits: Logits) -> Tensor:
        return kl_ratios(logprobs_of(logits), logprobs_of(SAMPLER), MASK, level=level)

    assert found(POLICY).isfinite().all()
    torch.testing.assert_close(found(POLICY)[MASK], reference(POLICY, SAMPLER)[MASK], rtol=1e-12, atol=0)
    expected = gradient_at(POLICY, lambda logits: weighed(reference(logits, SAMPLER)))
    assert_equal(gradient_at(POLICY, lambda logits: weighed(found(logits))), expected)
    assert expected.abs().min() > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_ratios_of_masked_rows_and_beyond_their_bound(level):
    sampler = torch.tensor([[math.nan] * 3, [-50.0, -50.0, math.nan], [0.0, -1.0, 0.0]])
    logprobs = torch.tensor([[math.nan] * 3, [0.0, 0.0, math.inf], [-1e4, -2.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[False] * 3, [True, True, False], [True] * 3])
    ratios = kl_ratios(logprobs, sampler, mask, level=level)
    largest = math.exp(LARGEST_LOG_RATIO)
    first = math.exp(50) if level == "token" else largest
    assert ratios[0].tolist() == [1.0] * 3  # an empty product
    assert ratios[1].tolist() == pytest.approx([first, largest, largest], rel=1e-5)
    assert ratios[2].tolist() == [0.0] * 3
    (gradient,) = torch.autograd.grad(ratios[:, :2].sum(), logprobs)
    assert gradient.isfinite().all()
    assert not gradient[0].any()
    # where the bound holds the ratio is constant: only the first token's own prefix is below it
    assert gradient[1].tolist() == pytest.approx([first if level == "token" else 0.0, 0.0, 0.0], rel=1e-5)
    with pytest.raises(ValueError, match="level is 'row'"):
        kl_ratios(logprobs, sampler, mask, level="row")


def test_the_table_has_every_combination_and_calls_right_what_is_right():
    estimators, places, levels = ("k1", "k2", "k3"), ("reward", "loss", "weighted_loss"), ("token", "sequence")
    assert set(KL_GRADIENTS) == set(EXPECTED) == {(e, p, lv) for e in estimators for p in places for lv in levels}
    wanted = forward(POLICY, REFERENCE, SAMPLER)
    for key, says in KL_GRADIENTS.items():
        right = distance(obtained(key, POLICY, REFERENCE, SAMPLER), wanted) < 1e-9
        assert right == (says.startswith("∇KL(π‖π_ref)") and not says.startswith("∇KL(π‖π_ref) −")), key
        assert right or distance(obtained(key, POLICY, REFERENCE, SAMPLER), wanted) > 0.05, key
    assert "standard deviation" in KL_GRADIENT_CONDITIONS
    assert "length" in KL_GRADIENT_CONDITIONS
    assert "top-k" in KL_GRADIENT_CONDITIONS


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(0.1, 2.5), st.sampled_from(sorted(KL_GRADIENTS)))
def test_the_rows_hold_for_other_policies(seed, scale, key):
    policy, reference, sampler = (random_logits(seed + offset, scale) for offset in range(3))
    actual, expected = obtained(key, policy, reference, sampler), EXPECTED[key](policy, reference, sampler)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_without_reward_to_go_a_token_does_not_answer_for_what_follows():
    def value(logits: Logits) -> Tensor:
        logprobs = logprobs_of(logits)
        own = (logprobs - logprobs_of(REFERENCE)).detach()
        return (probabilities(POLICY) * total(own * logprobs)).sum()

    own_only = gradient_at(POLICY, value)
    assert_equal(own_only, local_forward(POLICY, REFERENCE, POLICY))
    assert distance(own_only, forward(POLICY, REFERENCE, POLICY)) > 0.1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_hardly_pull_near_the_reference(estimator, level):
    def norm(distance_: float, estimator_: str) -> float:
        near = REFERENCE + distance_ * POLICY
        return penalized(near, REFERENCE, estimator=estimator_, level=level).norm().item()

    assert norm(1e-2, "k1") / norm(1e-3, "k1") == pytest.approx(10, rel=0.1)
    assert norm(1e-2, estimator) / norm(1e-3, estimator) == pytest.approx(100, rel=0.1)


def test_k3_per_token_is_k2_per_token_to_first_order():
    for far, bound in ((1e-1, 0.3), (1e-2, 0.03), (1e-3, 0.003)):
        near = REFERENCE + far * POLICY
        k2_loss, k3_loss = (as_loss(near, REFERENCE, estimator=name, level="token") for name in ("k2", "k3"))
        assert distance(k3_loss, k2_loss) < bound


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_ratios_give_the_local_gradient_in_the_samplers_states(estimator):
    actual = as_loss(POLICY, REFERENCE, estimator=estimator, level="token", sampler=SAMPLER, ratios=token_ratios)
    assert_equal(actual, local_forward(POLICY, REFERENCE, SAMPLER))
    assert distance(actual, forward(POLICY, REFERENCE, SAMPLER)) > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_off_policy_without_ratios_nothing_is_right(estimator):
    for level in ("token", "sequence"):
        unweighted = as_loss(POLICY, REFERENCE, estimator=estimator, level=level, sampler=SAMPLER)
        assert distance(unweighted, forward(POLICY, REFERENCE, SAMPLER)) > 0.1
    if estimator == "k1":
        assert_equal(unweighted, -gradient_at(POLICY, lambda logits: divergence(SAMPLER, logits)))


def test_a_geometric_mean_is_not_the_ratio_of_the_sequence():
    def geometric(logits: Logits, sampler: Logits) -> Tensor:
        mean = total(logprobs_of(logits) - logprobs_of(sampler)) / MASK.sum(1)
        return mean.exp()[:, None].expand_as(MASK)

    for level in ("token", "sequence"):
        actual = as_loss(POLICY, REFERENCE, estimator="k3", level=level, sampler=SAMPLER, ratios=geometric)
        assert distance(actual, forward(POLICY, REFERENCE, SAMPLER)) > 0.1
        assert distance(actual, local_forward(POLICY, REFERENCE, SAMPLER)) > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_on_policy_a_ratio_of_one_with_its_gradient_repairs_k1_and_k3(estimator):
    for level, ratios in (("token", prefix_ratios), ("sequence", whole_ratios)):
        actual = as_loss(POLICY, REFERENCE, estimator=estimator, level=level, sampler=POLICY, ratios=ratios)
        assert_equal(actual, forward(POLICY, REFERENCE, POLICY))


def test_a_ratio_with_gradient_would_spoil_k2_and_one_without_k1_and_k3():
    def value(logits: Logits) -> Tensor:
        squares = kl_loss(logprobs_of(logits), logprobs_of(REFERENCE), MASK, estimator="k2", level="sequence").sum(1)
        return (probabilities(logits) * squares).sum()  # as p_sampler · ρ with ρ attached

    assert_equal(gradient_at(POLICY, value), second_moment(POLICY, REFERENCE, "sequence"))

    def detached(logits: Logits, sampler: Logits) -> Tensor:
        return whole_ratios(logits, sampler).detach()

    for estimator, expected in (("k1", torch.zeros_like(POLICY)), ("k3", reverse(POLICY, REFERENCE, SAMPLER))):
        actual = as_loss(POLICY, REFERENCE, estimator=estimator, level="sequence", sampler=SAMPLER, ratios=detached)
        assert_equal(actual, expected)


@pytest.mark.parametrize(("level", "ratios"), [("token", token_ratios), ("sequence", whole_ratios)])
def test_weighted_k3_has_the_gradient_of_weighted_k2_on_every_sample(level, ratios):
    for row in range(len(SEQUENCES)):

        def value(logits: Logits, estimator: str, row: int = row) -> Tensor:
            losses = kl_loss(
                logprobs_of(logits),
                logprobs_of(REFERENCE),
                MASK,
                estimator=estimator,
                level=level,
                ratios=ratios(logits, SAMPLER),
            )
            return losses[row].sum()

        k2_sample, k3_sample = (gradient_at(POLICY, lambda x, n=name: value(x, n)) for name in ("k2", "k3"))
        assert_equal(k3_sample, k2_sample)


@pytest.mark.parametrize("key", [key for key in KL_GRADIENTS if key[1] == "reward"], ids="-".join)
def test_off_policy_the_penalty_needs_the_weight_of_the_whole_sequence(key):
    estimator, _, level = key
    sampled, expected = probabilities(SAMPLER)[:, None], EXPECTED[key](POLICY, REFERENCE, SAMPLER)
    whole = penalized(
        POLICY, REFERENCE, estimator=estimator, level=level, weights=sampled * whole_ratios(POLICY, SAMPLER)
    )
    by_token = penalized(
        POLICY,
        REFERENCE,
        estimator=estimator,
        level=level,
        weights=sampled * token_ratios(POLICY, SAMPLER).nan_to_num(),
    )
    assert_equal(whole, expected)
    assert distance(by_token, expected) > 0.05


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_penalty_from_before_the_update_lacks_the_divergence_from_the_sampler(level):
    penalty = kl_penalty(logprobs_of(SAMPLER), logprobs_of(REFERENCE), MASK, level=level)
    actual = gradient_at(POLICY, lambda logits: (probabilities(POLICY) * total(penalty * logprobs_of(logits))).sum())
    stale = forward(POLICY, REFERENCE, POLICY) - forward(POLICY, SAMPLER, POLICY)
    assert_equal(actual, stale)


def test_the_token_level_has_less_variance_here():
    def mean_square(level: str) -> float:
        penalty = kl_penalty(logprobs_of(POLICY), logprobs_of(REFERENCE), MASK, level=level)
        squares = [
            gradient_at(POLICY, lambda logits, r=row: total(penalty * logprobs_of(logits))[r]).square().sum().item()
            for row in range(len(SEQUENCES))
        ]
        return sum(p * square for p, square in zip(probabilities(POLICY).tolist(), squares, strict=True))

    assert mean_square("token") < 0.9 * mean_square("sequence")


def test_dividing_by_the_length_spoils_it():
    lengths = MASK.sum(1, keepdim=True)
    normalized = penalized(POLICY, REFERENCE, weights=probabilities(POLICY)[:, None] / lengths)
    wanted = forward(POLICY, REFERENCE, POLICY)
    assert torch.cosine_similarity(normalized.flatten(), wanted.flatten(), dim=0) < 0.99


def test_truncated_sampling_spoils_it():
    largest_two = POLICY.topk(2).indices
    truncated = POLICY.masked_fill(torch.ones_like(POLICY, dtype=torch.bool).scatter(1, largest_two, False), -math.inf)
    actual = penalized(POLICY, REFERENCE, weights=probabilities(truncated)[:, None])
    assert distance(actual, forward(POLICY, REFERENCE, POLICY)) > 0.1


def test_centering_in_a_group_only_scales_it_and_the_standard_deviation_spoils_it():
    """Groups of two, all 15 × 15 of them, with the penalty of the sequence as part of the reward."""
    chances = probabilities(POLICY)
    penalty = kl_penalty(logprobs_of(POLICY), logprobs_of(REFERENCE), MASK, level="sequence")[:, 0]
    deviations = (penalty[:, None] - penalty[None, :]) / 2  # the first's, from the mean of the pair
    stds = (penalty[:, None] - penalty[None, :]).abs() / math.sqrt(2) + 1e-4
    wanted = forward(POLICY, REFERENCE, POLICY)

    def descended(advantages: Tensor) -> Tensor:
        first = chances * (advantages * chances[None, :]).sum(1)  # expected over the partner
        return gradient_at(POLICY, lambda logits: (first * total(logprobs_of(logits))).sum())

    assert_equal(descended(deviations), wanted / 2)
    divided = descended(deviations / stds)
    assert torch.cosine_similarity(divided.flatten(), wanted.flatten(), dim=0) < 0.99
