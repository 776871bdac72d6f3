"""Group-relative advantages against hand-worked numbers and plain loops."""

import math
import statistics

import pytest
import torch

from taurl.functional.advantages import group_relative, has_variance

NAN = math.nan
REWARDS = [[1.0, 0.0, 0.0, 3.0], [0.5, NAN, 2.5, NAN], [1.0, 1.0, 1.0, 1.0], [NAN, 7.0, NAN, NAN], [NAN] * 4]


def loop(rewards: list[list[float]], scale: str, epsilon: float) -> list[list[float]]:
    everything = [reward for group in rewards for reward in group if not math.isnan(reward)]
    result = []
    for group in rewards:
        valid = [reward for reward in group if not math.isnan(reward)]
        divisor = 1.0
        if scale == "group":
            divisor = (statistics.stdev(valid) if len(valid) > 1 else 0.0) + epsilon
        elif scale == "batch":
            divisor = statistics.stdev(everything) + epsilon
        result.append([0.0 if math.isnan(r) else (r - statistics.fmean(valid)) / divisor for r in group])
    return result


def test_hand_worked_group():
    # mean 1, deviations 0 −1 −1 2, unbiased std √(6/3) = √2
    expected = torch.tensor([[0.0, -1.0, -1.0, 2.0]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    assert torch.equal(group_relative(rewards, scale="none"), expected)
    torch.testing.assert_close(group_relative(rewards), expected / (math.sqrt(2) + 1e-4), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_equals_a_loop_with_rewards_that_do_not_apply(scale):
    result = group_relative(torch.tensor(REWARDS, dtype=torch.float64), scale=scale, epsilon=1e-3)
    expected = torch.tensor(loop(REWARDS, scale, 1e-3), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_nothing_to_compare_with_is_exactly_zero(scale):
    rewards = torch.tensor(REWARDS)
    result = group_relative(rewards, scale=scale)
    assert result.isfinite().all()
    assert not result[2:].any()
    assert not group_relative(torch.full((3, 1), 5.0), scale=scale).any()
    assert not group_relative(torch.full((2, 3), NAN), scale=scale).any()
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.mean() != 0.1  # so a computed deviation would not be 0
    assert not group_relative(rewards, scale=scale, epsilon=1e-30).any()
    assert group_relative(torch.zeros(0, 4), scale=scale).shape == (0, 4)


def test_which_groups_carry_a_signal():
    assert has_variance(torch.tensor(REWARDS)).tolist() == [True, True, False, False, False]


def test_large_float32_rewards_stay_finite_and_dtypes_are_kept():
    rewards = torch.tensor([[1e30, -1e30, 0.0]])  # squares overflow float32
    torch.testing.assert_close(group_relative(rewards), torch.tensor([[1.0, -1.0, 0.0]]))
    assert group_relative(rewards.double()).dtype == torch.float64
    assert group_relative(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"rewards\[0, 1\] is inf"):
        group_relative(torch.tensor([[0.0, math.inf]]))
    with pytest.raises(ValueError, match=r"\[4\], expected floats \[prompts, group\]"):
        group_relative(torch.zeros(4))
    with pytest.raises(ValueError, match="'std', expected"):
        group_relative(torch.zeros(1, 2), scale="std")
    with pytest.raises(ValueError, match=r"epsilon is 0\.0"):
        group_relative(torch.zeros(1, 2), epsilon=0.0)
