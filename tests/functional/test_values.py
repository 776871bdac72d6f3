"""Targets and combinations of V, Q and A: by hand, by loop, by enumeration, and where nothing may be read."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taurl.functional.values import (
    action_advantages,
    double_q_target,
    dueling_action_values,
    epsilon_greedy_probabilities,
    expected_sarsa_target,
    q_learning_target,
    sarsa_target,
    state_values,
    td_target,
)

NAN, INF = math.nan, math.inf
seeds = st.integers(0, 2**32)


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Targets

REWARDS, TERMINATED = double([1, 2, 3]), torch.tensor([False, True, False])
ONLINE = double([[5, 1, 4], [NAN, NAN, NAN], [0, -2, -1]])
TARGET = double([[2, 8, 6], [NAN, INF, NAN], [-4, -8, -6]])
ACTIONS = torch.tensor([2, -7, 1])  # no action follows a terminated step
PROBABILITIES = double([[0.5, 0.25, 0.25], [NAN, NAN, NAN], [0, 0.5, 0.5]])


def targets(discount: float | torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "td": td_target(REWARDS, double([4, NAN, -4]), TERMINATED, discount=discount),
        "q_learning": q_learning_target(REWARDS, TARGET, TERMINATED, discount=discount),
        "double_q": double_q_target(REWARDS, ONLINE, TARGET, TERMINATED, discount=discount),
        "sarsa": sarsa_target(REWARDS, TARGET, ACTIONS, TERMINATED, discount=discount),
        "expected_sarsa": expected_sarsa_target(REWARDS, TARGET, PROBABILITIES, TERMINATED, discount=discount),
    }


BY_HAND = {  # r + ½ · a value of the next state
    "td": [3, 2, 1],
    "q_learning": [5, 2, 1],  # 8, −4
    "double_q": [2, 2, 1],  # the online network prefers action 0 both times: 2, −4
    "sarsa": [4, 2, -1],  # 6, −8
    "expected_sarsa": [3.25, 2, -0.5],  # ½·2 + ¼·8 + ¼·6 = 4.5, ½·(−8) + ½·(−6) = −7
}


@pytest.mark.parametrize("name", BY_HAND)
def test_targets_by_hand(name):
    assert targets(0.5)[name].tolist() == BY_HAND[name]


@pytest.mark.parametrize("name", BY_HAND)
def test_each_step_may_have_a_discount_of_its_own(name):
    discounts = double([0.5, 0.3, 1.0])
    found, half, whole = targets(discounts)[name], targets(0.5)[name], targets(1.0)[name]
    assert found.tolist() == [half[0].item(), half[1].item(), whole[2].item()]


def test_n_steps_through_the_discount():
    """Two TD(0) targets in a row are one with the rewards summed and γ²."""
    first, second, value, never = double([3.0]), double([5.0]), double([7.0]), torch.tensor([False])
    nested = td_target(first, td_target(second, value, never, discount=0.9), never, discount=0.9)
    torch.testing.assert_close(td_target(first + 0.9 * second, value, never, discount=0.9**2), nested)


@settings(max_examples=50)
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_how_the_targets_hang_together(seed, rows, actions):
    rewards, q, other = normal(seed, rows), normal(seed + 1, rows, actions), normal(seed + 2, rows, actions)
    terminated, discount = normal(seed + 3, rows) > 1, 0.9
    common = {"terminated": terminated, "discount": discount}
    greedy = q_learning_target(rewards, q, **common)
    torch.testing.assert_close(double_q_target(rewards, q, q, **common), greedy)
    assert (double_q_target(rewards, other, q, **common) <= greedy).all()
    torch.testing.assert_close(
        expected_sarsa_target(rewards, q, epsilon_greedy_probabilities(q, epsilon=0.0), **common), greedy
    )
    chosen = other.argmax(-1)
    certain = torch.nn.functional.one_hot(chosen, actions).double()
    sarsa = sarsa_target(rewards, q, chosen, **common)
    torch.testing.assert_close(expected_sarsa_target(rewards, q, certain, **common), sarsa)
    # SARSA's target is expected SARSA's on average over the next action.
    policy = torch.softmax(other, -1)
    average = sum(policy[:, a] * sarsa_target(rewards, q, torch.full((rows,), a), **common) for a in range(actions))
    torch.testing.assert_close(expected_sarsa_target(rewards, q, policy, **common), average)
    torch.testing.assert_close(td_target(rewards, state_values(q, policy), terminated, discount=discount), average)


def test_double_q_takes_away_the_bias_of_the_maximum():
    """Every outcome of independent noise ±1 on four estimates of 0: the maximum is ½ too high, double Q is right."""
    outcomes = double(list(itertools.product([-1, 1], repeat=4)))
    online, target = outcomes[:, :2], outcomes[:, 2:]
    nothing, never = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.bool)
    assert q_learning_target(nothing, target, never, discount=1.0).mean() == 0.5
    assert double_q_target(nothing, online, target, never, discount=1.0).mean() == 0


def test_actions_that_are_not_allowed():
    q = double([[1, -INF, 3], [-INF, -INF, 2]])
    rewards, never = double([0, 0]), torch.tensor([False, False])
    probabilities = epsilon_greedy_probabilities(q, epsilon=0.5)
    assert probabilities.tolist() == [[0.25, 0, 0.75], [0, 0, 1]]
    assert q_learning_target(rewards, q, never, discount=1.0).tolist() == [3, 2]
    assert expected_sarsa_target(rewards, q, probabilities, never, discount=1.0).tolist() == [2.5, 2]


def test_epsilon_greedy():
    q = double([[1, 2, 2, 0]])
    assert epsilon_greedy_probabilities(q, epsilon=0.2)[0].tolist() == pytest.approx([0.05, 0.45, 0.45, 0.05])
    assert epsilon_greedy_probabilities(q, epsilon=1.0)[0].tolist() == [0.25] * 4
    found = epsilon_greedy_probabilities(normal(1, 3, 4, 5).bfloat16(), epsilon=0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 4))


def test_targets_are_detached_and_of_the_widest_dtype():
    rewards, terminated = torch.ones(2, dtype=torch.bfloat16), torch.tensor([False, True])
    q = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    actions = torch.tensor([0, 1])
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        for found in (
            td_target(rewards.to(dtype), q[:, 0], terminated, discount=0.5),
            td_target(rewards, q[:, 0], terminated, discount=torch.ones(2, dtype=dtype)),
            q_learning_target(rewards.to(dtype), q, terminated, discount=0.5),
            double_q_target(rewards.to(dtype), q, q, terminated, discount=0.5),
            sarsa_target(rewards.to(dtype), q, actions, terminated, discount=0.5),
            expected_sarsa_target(rewards.to(dtype), q, q / 3, terminated, discount=0.5),
            action_advantages(q, rewards.to(dtype)),
        ):
            assert found.dtype == expected
            assert not found.requires_grad


# Q, V and A


@settings(max_examples=50)
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_advantages_have_mean_zero_under_the_policy(seed, rows, actions):
    q, policy = normal(seed, rows, actions), torch.softmax(normal(seed + 1, rows, actions), -1)
    values = state_values(q, policy)
    expected = [sum(p * x for p, x in zip(*row, strict=True)) for row in zip(policy.tolist(), q.tolist(), strict=True)]
    assert values.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    advantages = action_advantages(q, values)
    torch.testing.assert_close(state_values(advantages, policy), torch.zeros_like(values), rtol=0, atol=1e-13)
    best = action_advantages(q, q.amax(-1))
    assert (best <= 0).all()
    assert (best.amax(-1) == 0).all()


def test_gradients_of_state_values():
    q, policy = normal(1, 2, 3), torch.softmax(normal(2, 2, 3), -1)
    policy[0, 1] = 0
    leaves = q.requires_grad_(), policy.requires_grad_()
    assert torch.autograd.gradcheck(state_values, leaves)
    q = double([[1, -INF]]).requires_grad_()
    policy = double([[1, 0]]).requires_grad_()
    state_values(q, policy).sum().backward()
    assert q.grad.tolist() == [[1, 0]]
    assert policy.grad.tolist() == [[1, 0]]


def test_dueling_by_hand():
    values, advantages = double([10, 20]), double([[1, 2, 6], [0, 0, 0]])
    assert dueling_action_values(values, advantages).tolist() == [[8, 9, 13], [20, 20, 20]]
    assert dueling_action_values(values, advantages, baseline="max").tolist() == [[5, 6, 10], [20, 20, 20]]
    assert dueling_action_values(values.bfloat16(), advantages.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("baseline", ["mean", "max"])
def test_dueling_identifies_both_heads(baseline):
    values, advantages = normal(1, 4, 2).requires_grad_(), normal(2, 4, 2, 3).requires_grad_()
    q = dueling_action_values(values, advantages, baseline=baseline)
    torch.testing.assert_close(q.mean(-1) if baseline == "mean" else q.amax(-1), values)
    torch.testing.assert_close(dueling_action_values(values, advantages + 7, baseline=baseline), q)
    assert torch.equal(q.argmax(-1), advantages.argmax(-1))
    assert torch.autograd.gradcheck(lambda v, a: dueling_action_values(v, a, baseline=baseline), (values, advantages))


def test_bad_input_is_named():
    three, square, flags = torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rewards \[3\], next_values \[3, 3\]"):
        td_target(three, square, flags, discount=0.9)
    with pytest.raises(ValueError, match=r"terminated is torch\.float32"):
        td_target(three, three, three, discount=0.9)
    with pytest.raises(ValueError, match=r"terminated is torch\.float32"):
        sarsa_target(three, square, three.long(), three, discount=0.9)
    with pytest.raises(ValueError, match=r"discount is 1\.5"):
        q_learning_target(three, square, flags, discount=1.5)
    with pytest.raises(ValueError, match=r"discount reaches from 0\.0 to 2\.0"):
        td_target(three, three, flags, discount=torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match=r"discount \[1\]"):
        td_target(three, three, flags, discount=torch.ones(1))
    with pytest.raises(ValueError, match=r"next_action_values is \[3, 0\], expected \[\.\., A\]"):
        q_learning_target(three, square[:, :0], flags, discount=0.9)
    with pytest.raises(ValueError, match=r"next_target_action_values \[3, 2\]"):
        double_q_target(three, square, square[:, :2], flags, discount=0.9)
    with pytest.raises(ValueError, match=r"next_actions are torch\.float32"):
        sarsa_target(three, square, three, flags, discount=0.9)
    with pytest.raises(ValueError, match=r"next_actions \[2\]"):
        sarsa_target(three, square, torch.zeros(2, dtype=torch.int64), flags, discount=0.9)
    with pytest.raises(ValueError, match=r"probabilities \[3\]"):
        expected_sarsa_target(three, square, three, flags, discount=0.9)
    with pytest.raises(ValueError, match="epsilon is -1"):
        epsilon_greedy_probabilities(square, epsilon=-1)
    with pytest.raises(ValueError, match=r"values \[4\]"):
        action_advantages(square, torch.zeros(4))
    with pytest.raises(ValueError, match=r"values \[4\]"):
        dueling_action_values(torch.zeros(4), square)
    with pytest.raises(ValueError, match="baseline is 'median'"):
        dueling_action_values(three, square, baseline="median")
