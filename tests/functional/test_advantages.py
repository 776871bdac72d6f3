"""Advantages against hand-worked numbers, plain loops, theorems, and the policy gradient enumerated in full."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taurl.functional.advantages import (
    greedy_baseline,
    group_relative,
    has_variance,
    leave_one_out,
    normalize_then_sum,
    reinforce_plus_plus,
    sum_then_normalize,
)
from taurl.functional.whitening import whiten

NAN = math.nan
REWARDS = [[1.0, 0.0, 0.0, 3.0], [0.5, NAN, 2.5, NAN], [1.0, 1.0, 1.0, 1.0], [NAN, 7.0, NAN, NAN], [NAN] * 4]
GREEDY = [0.5, -1.0, 1.0, NAN, 2.0]
SCALES = ["group", "none", "batch"]
# Two rewards for each completion, the second apart in range and in where it applies.
SEVERAL = torch.stack(
    [torch.tensor(REWARDS), torch.tensor([[9.0, NAN, 5.0, 0.0], [1.0, NAN, NAN, 3.0]] * 2 + [[NAN] * 4])], 2
)
WEIGHTS = [0.5, 2.0]


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected) -> None:
    torch.testing.assert_close(found, double(expected), rtol=1e-12, atol=1e-14)


def valid(numbers) -> list[float]:
    return [number for number in numbers if not math.isnan(number)]


def deviation(numbers) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def loop(rewards: list[list[float]], scale: str, epsilon: float) -> list[list[float]]:
    everything = valid(itertools.chain(*rewards))
    result = []
    for group in rewards:
        divisor = {
            "none": 1.0,
            "group": deviation(valid(group)) + epsilon,
            "batch": deviation(everything) + epsilon,
            "mean": statistics.fmean(valid(group) or [1.0]),
        }[scale]
        result.append([0.0 if math.isnan(r) else (r - statistics.fmean(valid(group))) / divisor for r in group])
    return result


# ---- the group as the baseline


def test_hand_worked_group():
    # mean 1, deviations 0 −1 −1 2, unbiased std √(6/3) = √2
    rewards = double([[1.0, 0.0, 0.0, 3.0]])
    expected = double([[0.0, -1.0, -1.0, 2.0]])
    assert torch.equal(group_relative(rewards, scale="none"), expected)
    torch.testing.assert_close(group_relative(rewards), expected / (math.sqrt(2) + 1e-4), rtol=1e-14, atol=0)
    assert torch.equal(group_relative(2 * rewards, scale="mean"), expected)  # mean 2, deviations 0 −2 −2 4


@pytest.mark.parametrize("scale", [*SCALES, "mean"])
def test_equals_a_loop_with_rewards_that_do_not_apply(scale):
    result = group_relative(double(REWARDS), scale=scale, epsilon=1e-3)
    torch.testing.assert_close(result, double(loop(REWARDS, scale, 1e-3)), rtol=1e-13, atol=1e-15)


def test_which_groups_carry_a_signal():
    assert has_variance(torch.tensor(REWARDS)).tolist() == [True, True, False, False, False]


# ---- leave one out


def test_leave_one_out_by_hand():
    # the others' means: (0+0+3)/3 = 1, (1+0+3)/3 = 4/3 twice, (1+0+0)/3 = 1/3
    close(leave_one_out(double([[1.0, 0.0, 0.0, 3.0]])), [[0.0, -4 / 3, -4 / 3, 8 / 3]])


def test_leave_one_out_equals_a_loop():
    expected = []
    for group in REWARDS:
        row = []
        for place, reward in enumerate(group):
            others = valid(group[:place] + group[place + 1 :])
            row.append(reward - sum(others) / len(others) if others and not math.isnan(reward) else 0.0)
        expected.append(row)
    close(leave_one_out(double(REWARDS)), expected)


# ---- the greedy completion


def test_greedy_baseline_by_hand():
    expected = [[0.5, -0.5, -0.5, 2.5], [1.5, 0.0, 3.5, 0.0], [0.0] * 4, [0.0] * 4, [0.0] * 4]
    assert torch.equal(greedy_baseline(double(REWARDS), double(GREEDY)), double(expected))
    assert torch.equal(greedy_baseline(double([[3.0], [1.0]]), double([1.0, 1.5])), double([[2.0], [-0.5]]))


# ---- the batch


def test_reinforce_plus_plus_by_hand():
    rewards = double([[1.0, 3.0], [5.0, 7.0]])
    # mean 4, deviations −3 −1 1 3, variance 20/3; about the groups' means −1 1 −1 1, variance 4/3
    close(reinforce_plus_plus(rewards), (double([[-3.0, -1.0], [1.0, 3.0]]) / (math.sqrt(20 / 3) + 1e-4)).tolist())
    found = reinforce_plus_plus(rewards, group_baseline=True)
    close(found, (double([[-1.0, 1.0], [-1.0, 1.0]]) / (math.sqrt(4 / 3) + 1e-4)).tolist())


@pytest.mark.parametrize("group_baseline", [False, True])
def test_reinforce_plus_plus_equals_a_loop(group_baseline):
    numbers = loop(REWARDS, "none", 0.0) if group_baseline else REWARDS
    kept = [(i, g) for i, group in enumerate(REWARDS) for g, reward in enumerate(group) if not math.isnan(reward)]
    everything = [numbers[i][g] for i, g in kept]
    expected = [[0.0] * 4 for _ in REWARDS]
    for i, g in kept:
        expected[i][g] = (numbers[i][g] - statistics.fmean(everything)) / (statistics.stdev(everything) + 1e-3)
    close(reinforce_plus_plus(double(REWARDS), group_baseline=group_baseline, epsilon=1e-3), expected)


def test_reinforce_plus_plus_needs_no_group():
    close(reinforce_plus_plus(double([[0.0], [2.0]]), epsilon=1e-15), [[-math.sqrt(0.5)], [math.sqrt(0.5)]])


# ---- several rewards


def test_two_signals_count_twice_only_if_normalized_apart():
    """The second group differs in both rewards, the first in one: normalizing the sum makes them alike."""
    rewards = double([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    one = math.sqrt(0.5)
    close(sum_then_normalize(rewards, double([1.0, 1.0]), epsilon=1e-15), [[-one, one], [-one, one]])
    # each reward gives ∓√½; the sums ∓√½ and ∓2√½ have variance (½ + ½ + 2 + 2) / 3 = 5/3
    one = math.sqrt(0.5 / (5 / 3))
    close(normalize_then_sum(rewards, double([1.0, 1.0]), epsilon=1e-15), [[-one, one], [-2 * one, 2 * one]])


@pytest.mark.parametrize("scale", SCALES)
def test_sum_then_normalize_equals_a_loop(scale):
    totals = []
    for group in SEVERAL.double().tolist():
        terms = [[w * r for w, r in zip(WEIGHTS, several, strict=True) if not math.isnan(r)] for several in group]
        totals.append([sum(term) if term else NAN for term in terms])
    close(sum_then_normalize(SEVERAL.double(), double(WEIGHTS), scale=scale, epsilon=1e-3), loop(totals, scale, 1e-3))


def test_normalize_then_sum_equals_a_loop():
    each = [loop(SEVERAL.double()[:, :, k].tolist(), "group", 1e-3) for k in (0, 1)]
    sums = [[0.5 * a + 2.0 * b for a, b in zip(*groups, strict=True)] for groups in zip(*each, strict=True)]
    some = [[not all(map(math.isnan, several)) for several in group] for group in SEVERAL.tolist()]
    counted = [s for group, kept in zip(sums, some, strict=True) for s, keep in zip(group, kept, strict=True) if keep]
    mean, divisor = statistics.fmean(counted), statistics.stdev(counted) + 1e-3
    assert sum(map(sum, some)) < sum(map(len, sums)) - 4  # completions without any reward, in a group with some too
    expected = [
        [(s - mean) / divisor if keep else 0.0 for s, keep in zip(group, kept, strict=True)]
        for group, kept in zip(sums, some, strict=True)
    ]
    close(normalize_then_sum(SEVERAL.double(), double(WEIGHTS), epsilon=1e-3), expected)


def test_one_reward_alone():
    rewards = double(REWARDS)[:, :, None]
    assert torch.equal(sum_then_normalize(rewards, double([1.0])), group_relative(double(REWARDS)))


# ---- what they have in common

ESTIMATORS = {
    **{f"group_relative {scale}": lambda r, scale=scale: group_relative(r, scale=scale) for scale in SCALES},
    "leave_one_out": leave_one_out,
    "greedy_baseline": lambda r: greedy_baseline(r, r.nanmean(1)),
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus group": lambda r: reinforce_plus_plus(r, group_baseline=True),
    "sum_then_normalize": lambda r: sum_then_normalize(torch.stack([r, r], 2), torch.ones(2)),
    "normalize_then_sum": lambda r: normalize_then_sum(torch.stack([r, r], 2), torch.ones(2)),
    "whiten": lambda r: whiten(r, ~r.isnan()),
}
OVER_THE_BATCH = {"reinforce_plus_plus", "whiten"}  # whose baseline is not the group's
GROUPED = sorted(set(ESTIMATORS) - OVER_THE_BATCH - {"greedy_baseline"})
everywhere = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


@pytest.mark.parametrize("name", GROUPED)
def test_nothing_to_compare_with_is_exactly_zero(name):
    estimator = ESTIMATORS[name]
    result = estimator(torch.tensor(REWARDS))
    assert result[:2].any(1).all()
    assert not result[2:].any()
    assert not estimator(torch.full((3, 1), 5.0)).any()
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.mean() != 0.1  # so a computed deviation would not be 0
    assert not estimator(rewards).any()


@everywhere
def test_absent_rewards_have_advantage_zero(estimator):
    result = estimator(torch.tensor(REWARDS))
    assert result.isfinite().all()
    assert not result[torch.tensor(REWARDS).isnan()].any()
    assert not estimator(torch.full((2, 3), NAN)).any()
    assert estimator(torch.zeros(0, 4)).shape == (0, 4)


@everywhere
def test_no_gradient_and_dtypes_are_kept(estimator):
    for given_dtype, expected in [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]:
        rewards = torch.tensor(REWARDS, dtype=given_dtype, requires_grad=True)
        result = estimator(rewards)
        assert result.dtype == expected
        assert not result.requires_grad
        exact = estimator(double(REWARDS))  # all these rewards are exact in bfloat16
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rewards.detach().double(), double(REWARDS), rtol=0, atol=0, equal_nan=True)


@everywhere
@pytest.mark.parametrize(("scale", "dtype"), [(1e30, torch.float32), (1e-30, torch.float32), (1e250, torch.float64)])
def test_huge_and_tiny_rewards(estimator, scale, dtype):
    """Their squares leave the range of the dtype; the advantages do not."""
    rewards = torch.tensor([[1.0, -1.0, 0.0], [2.0, 2.0, -4.0]], dtype=dtype)
    result = estimator(rewards * scale)
    assert result.isfinite().all()
    assert result[0, 0] > 0
    assert result[0, 1] < 0


def test_large_rewards_keep_their_advantages():
    expected = torch.tensor([[1.0, -1.0, 0.0]])
    torch.testing.assert_close(group_relative(torch.tensor([[1e30, -1e30, 0.0]])), expected)


# ---- theorems

number = st.floats(-100, 100, width=32)


@st.composite
def batches(draw, min_group=1):
    prompts, group = draw(st.integers(1, 4)), draw(st.integers(min_group, 5))
    rows = draw(st.lists(st.lists(number, min_size=group, max_size=group), min_size=prompts, max_size=prompts))
    return double(rows)


def agree(found: Tensor, expected: Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * size)


@given(batches(min_group=2))
@settings(max_examples=50)
def test_leave_one_out_is_the_centered_advantage_made_larger(rewards):
    group = rewards.shape[1]
    agree(leave_one_out(rewards), group / (group - 1) * (rewards - rewards.mean(1, keepdim=True)))
    agree(leave_one_out(rewards), group / (group - 1) * group_relative(rewards, scale="none"))


@given(batches(), st.integers(-1000, 1000))
@settings(max_examples=30)
def test_a_constant_added_to_all_rewards_changes_nothing(rewards, shift):
    for name, estimator in ESTIMATORS.items():
        if name != "greedy_baseline" and rewards.std(unbiased=False) > 1e-2 and min_spread(rewards) > 1e-2:
            torch.testing.assert_close(estimator(rewards + shift), estimator(rewards), rtol=1e-6, atol=1e-6)


def min_spread(rewards: Tensor) -> float:
    """The smallest spread of a group that has one: near 0 a rounding of the shifted rewards is itself a signal."""
    spreads = [s for s in (rewards.amax(1) - rewards.amin(1)).tolist() if s > 0]
    return min(spreads, default=1.0)


@given(batches(min_group=2), st.lists(st.integers(-50, 50), min_size=4, max_size=4))
@settings(max_examples=30)
def test_a_constant_of_each_prompt_changes_nothing_where_the_group_is_the_baseline(rewards, shifts):
    shifted = rewards.round() + torch.tensor(shifts[: len(rewards)])[:, None]
    for name in GROUPED:
        if name != "group_relative batch":  # whose std sees how the prompts differ
            torch.testing.assert_close(
                ESTIMATORS[name](shifted), ESTIMATORS[name](rewards.round()), rtol=1e-9, atol=1e-9
            )


@given(batches(), st.sampled_from([0.25, 0.5, 8.0, 1024.0]))
@settings(max_examples=30)
def test_the_scale_of_the_rewards(rewards, factor):
    """Without a std the advantages scale with the rewards; with one they do not, if ε scales along."""
    for scaling in (leave_one_out, lambda r: group_relative(r, scale="none"), lambda r: greedy_baseline(r, r[:, 0])):
        agree(scaling(factor * rewards), factor * scaling(rewards), 100 * factor)
    for invariant in (
        group_relative,
        lambda r, epsilon: group_relative(r, scale="batch", epsilon=epsilon),
        reinforce_plus_plus,
        lambda r, epsilon: reinforce_plus_plus(r, group_baseline=True, epsilon=epsilon),
        whiten,
    ):
        agree(invariant(factor * rewards, epsilon=factor * 1e-4), invariant(rewards, epsilon=1e-4))


@given(batches(min_group=2), st.data())
@settings(max_examples=30)
def test_sums_to_zero_and_follows_the_order_of_its_batch(rewards, data):
    prompts = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    within = torch.tensor(data.draw(st.permutations(range(rewards.shape[1]))))
    for name, estimator in ESTIMATORS.items():
        result = estimator(rewards)
        if name in OVER_THE_BATCH:
            assert abs(result.sum()) < 1e-9
        elif name != "greedy_baseline":
            assert result.sum(1).abs().max() < 1e-9 * 1000
        torch.testing.assert_close(
            estimator(rewards[prompts][:, within]), result[prompts][:, within], rtol=1e-6, atol=1e-6
        )


def test_expected_gradient_by_enumeration():
    """Over all groups of three from a policy on three actions: E[Σ_g A_g ∇ log π(a_g)] / G against ∇ E[r]."""
    logits, rewards, group = double([0.3, -0.8, 1.1]), double([2.0, -1.0, 0.5]), 3
    policy = logits.softmax(0)
    exact = policy * (rewards - policy @ rewards)  # ∂ Σ_a π_a r_a / ∂ logits
    scores = torch.eye(3, dtype=torch.float64) - policy  # ∂ log π_a / ∂ logits, a row for each a
    greedy = rewards[policy.argmax()][None]

    def expectation(advantages) -> Tensor:
        total = torch.zeros(3, dtype=torch.float64)
        for actions in itertools.product(range(3), repeat=group):
            chosen = list(actions)
            total += policy[chosen].prod() * (advantages(rewards[chosen][None])[0] @ scores[chosen]) / group
        return total

    torch.testing.assert_close(expectation(leave_one_out), exact)
    torch.testing.assert_close(expectation(lambda r: greedy_baseline(r, greedy)), exact)
    torch.testing.assert_close(expectation(lambda r: group_relative(r, scale="none")), (group - 1) / group * exact)
    scaled = expectation(group_relative)
    assert torch.linalg.matrix_rank(torch.stack([scaled, exact]), atol=1e-3) == 2  # another direction


def test_over_their_mean_rewards_of_0_or_1_climb_the_likelihood_of_a_right_answer():
    """Over all groups, E[Σ_g A_g ∇ log π(a_g)] / G is the gradient of −Σ_{k<G} (1 − P)^k / k, near that of log P."""
    right = double([1.0, 0.0, 0.0, 1.0])
    for group in (2, 3, 5):
        logits = double([0.3, 1.8, 1.1, -1.4]).requires_grad_()
        policy = logits.softmax(0)
        failing = 1 - policy @ right
        (exact,) = torch.autograd.grad(-sum(failing**k / k for k in range(1, group)), logits, retain_graph=True)
        expected = torch.zeros(4, dtype=torch.float64)
        for actions in itertools.product(range(4), repeat=group):
            chosen = list(actions)
            advantages = group_relative(right[chosen][None], scale="mean")[0]
            (slope,) = torch.autograd.grad(advantages @ policy[chosen].log() / group, logits, retain_graph=True)
            expected += policy.detach()[chosen].prod() * slope
        torch.testing.assert_close(expected, exact)


def test_over_their_mean_rewards_know_no_unit_and_none_is_negative():
    rewards = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0], [1e-38, 0.0, NAN]])
    found = group_relative(rewards, scale="mean")
    torch.testing.assert_close(found, double([[-0.25, -1.0, 1.25], [0.0] * 3, [1.0, -1.0, 0.0]]).float())
    torch.testing.assert_close(group_relative(rewards * 0.37, scale="mean"), found)
    with pytest.raises(ValueError, match=r"rewards\[1, 0\] is -0.5, expected 0 or more for scale 'mean'"):
        group_relative(torch.tensor([[0.0, 1.0], [-0.5, 1.0]]), scale="mean")


def test_bad_input_is_named():
    one = torch.ones(1)
    for estimator in (
        group_relative,
        leave_one_out,
        reinforce_plus_plus,
        has_variance,
        lambda r: greedy_baseline(r, one),
    ):
        with pytest.raises(ValueError, match=r"rewards\[0, 1\] is inf"):
            estimator(torch.tensor([[0.0, math.inf]]))
        for bad in (torch.zeros(4), torch.zeros(2, 0), torch.zeros(2, 2, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"expected floats \[prompts, group\]"):
                estimator(bad)
    with pytest.raises(ValueError, match="'std', expected"):
        group_relative(torch.zeros(1, 2), scale="std")
    for epsilon in (0.0, -1.0, math.nan, math.inf):
        for estimator in (
            group_relative,
            whiten,
            lambda r, epsilon: reinforce_plus_plus(r, group_baseline=True, epsilon=epsilon),
        ):
            with pytest.raises(ValueError, match=f"epsilon is {epsilon}"):
                estimator(torch.zeros(1, 2), epsilon=epsilon)
    for bad in (torch.ones(2), torch.ones(1, 1), torch.ones(1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"greedy_rewards are .* expected floats \[1\]"):
            greedy_baseline(torch.zeros(1, 2), bad)
    with pytest.raises(ValueError, match=r"greedy_rewards\[0\] is -inf"):
        greedy_baseline(torch.zeros(1, 2), -math.inf * one)


@pytest.mark.parametrize("combine", [sum_then_normalize, normalize_then_sum])
def test_bad_several_rewards_are_named(combine):
    for rewards, weights in [((1, 2), 2), ((1, 2, 3), 2), ((1, 2, 0), 0), ((1, 0, 2), 2)]:
        with pytest.raises(ValueError, match=r"expected floats \[prompts, group, rewards\] and \[rewards\]"):
            combine(torch.zeros(rewards), torch.ones(weights))
    with pytest.raises(ValueError, match=r"weights are \[1.0, inf\]"):
        combine(torch.zeros(1, 2, 2), torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match=r"rewards\[0, 1, 0\] is inf"):
        combine(torch.tensor([[[0.0], [math.inf]]]), torch.ones(1))
