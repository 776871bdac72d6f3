"""Per-decision advantages against a plain loop, and where they must agree with the returns."""

import pytest
import torch

from taurl.functional.off_policy import per_decision_advantages
from taurl.functional.returns import discounted_returns

STEPS, BATCH, DISCOUNT = 6, 3, 0.9


def episodes(seed=0):
    """One episode a column: terminated, truncated, and not over at the end of the rollout."""
    generator = torch.Generator().manual_seed(seed)
    rewards, baselines, next_values = torch.randn(3, STEPS, BATCH, dtype=torch.float64, generator=generator)
    weights = torch.rand(STEPS, BATCH, dtype=torch.float64, generator=generator).mul(2).cumprod(0)
    terminated, truncated = torch.zeros(2, STEPS, BATCH, dtype=torch.bool)
    terminated[3, 0] = truncated[4, 1] = True
    next_values[terminated] = torch.nan
    return {
        "rewards": rewards,
        "baselines": baselines,
        "next_values": next_values,
        "weights": weights,
        "terminated": terminated,
        "truncated": truncated,
    }


def by_loop(rewards, baselines, next_values, weights, terminated, truncated):
    found = torch.zeros_like(rewards)
    for copy in range(rewards.shape[1]):
        for t in range(len(rewards)):
            factor = 1.0
            for k in range(t, len(rewards)):
                found[t, copy] += factor * weights[k, copy] * rewards[k, copy]
                factor *= DISCOUNT
                if terminated[k, copy]:
                    break
                if truncated[k, copy] or k == len(rewards) - 1:
                    found[t, copy] += factor * weights[k, copy] * next_values[k, copy]
                    break
            found[t, copy] -= weights[t, copy] * baselines[t, copy]
    return found


def test_a_plain_loop_gives_the_same():
    given = episodes()
    torch.testing.assert_close(per_decision_advantages(**given, discount=DISCOUNT), by_loop(**given))


def test_with_weights_of_one_it_is_the_return_less_the_baseline():
    given = episodes() | {"weights": torch.ones(STEPS, BATCH, dtype=torch.float64)}
    ends = given["terminated"], given["truncated"]
    returns = discounted_returns(given["rewards"], given["next_values"], *ends, discount=DISCOUNT)
    torch.testing.assert_close(per_decision_advantages(**given, discount=DISCOUNT), returns - given["baselines"])


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="weights"):
        per_decision_advantages(**episodes() | {"weights": torch.ones(STEPS, 1)}, discount=DISCOUNT)


def test_ends_that_are_no_booleans_are_refused_and_half_precision_is_widened_first():
    one = torch.full((1, 1), 300.0, dtype=torch.float16)
    ends = torch.zeros(1, 1, dtype=torch.bool)
    arguments = {"rewards": one, "baselines": one * 0, "next_values": one * 0, "weights": one}
    found = per_decision_advantages(**arguments, terminated=~ends, truncated=ends, discount=1.0)
    assert found.item() == 90_000
    with pytest.raises(ValueError, match=r"expected torch\.bool for both"):
        per_decision_advantages(**arguments, terminated=one, truncated=ends, discount=1.0)
