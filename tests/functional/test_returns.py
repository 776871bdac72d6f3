"""Returns and advantages against the sums that define them, written forwards; the scan against a step at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from taurl.functional._scan import LONGEST_PLAIN_SCAN, STEPS_PER_BLOCK, reverse_scan
from taurl.functional.returns import (
    discounted_returns,
    generalized_advantage,
    lambda_returns,
    n_step_returns,
    v_trace,
)

NAN, INF = math.nan, math.inf
EXACT = {"rtol": 1e-11, "atol": 1e-11}
fractions = st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0])


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def column(*numbers: float) -> torch.Tensor:
    return double(numbers)[:, None]


def flags(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.bool)[:, None]


def trajectory(seed: int, time: int, batch: int, *, ends: float = 0.2) -> SimpleNamespace:
    """V of the next state is `values[t + 1]` where the episode goes on, another number if truncated, else NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(steps: int) -> torch.Tensor:
        return torch.randn(steps, batch, dtype=torch.float64, generator=generator)

    terminated, truncated = torch.rand(2, time, batch, generator=generator) < ends / 2
    values = normal(time + 1)
    next_values = torch.where(truncated, normal(time), values[1:]).masked_fill(terminated, NAN)
    return SimpleNamespace(
        rewards=normal(time),
        values=values[:-1],
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
        ratios=normal(time).exp(),
    )


trajectories = st.builds(
    trajectory, st.integers(0, 2**32), st.integers(1, 2 * LONGEST_PLAIN_SCAN + 3), st.integers(1, 3)
)


def steps_of(x: SimpleNamespace) -> list[torch.Tensor]:
    return [x.rewards, x.next_values, x.terminated, x.truncated]


def gae_of(x: SimpleNamespace, **options) -> torch.Tensor:
    return generalized_advantage(x.rewards, x.values, x.next_values, x.terminated, x.truncated, **options)


def v_trace_of(x: SimpleNamespace, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return v_trace(x.rewards, x.values, x.next_values, x.ratios, x.terminated, x.truncated, **options)


class Reference:
    """One column in plain floats; every quantity is the sum of its definition from t to the end of the episode."""

    def __init__(self, x: SimpleNamespace, b: int, discount: float):
        self.rewards, self.values, self.next_values, self.terminated, self.truncated, self.ratios = (
            tensor[:, b].tolist()
            for tensor in (x.rewards, x.values, x.next_values, x.terminated, x.truncated, x.ratios)
        )
        self.discount = discount

    def end(self, t: int) -> int:
        while not (self.terminated[t] or self.truncated[t] or t == len(self.rewards) - 1):
            t += 1
        return t

    def next_value(self, t: int) -> float:
        return 0.0 if self.terminated[t] else self.next_values[t]

    def n_step(self, t: int, n: int) -> float:
        last = min(t + n - 1, self.end(t))
        total = math.fsum(self.discount ** (k - t) * self.rewards[k] for k in range(t, last + 1))
        return total + self.discount ** (last - t + 1) * self.next_value(last)

    def lambda_return(self, t: int, decay: float) -> float:
        longest = self.end(t) - t + 1
        mixed = math.fsum(decay ** (n - 1) * self.n_step(t, n) for n in range(1, longest))
        return (1 - decay) * mixed + decay ** (longest - 1) * self.n_step(t, longest)

    def error(self, t: int) -> float:
        return self.rewards[t] + self.discount * self.next_value(t) - self.values[t]

    def advantage(self, t: int, decay: float) -> float:
        return math.fsum((self.discount * decay) ** (k - t) * self.error(k) for k in range(t, self.end(t) + 1))

    def v_trace(self, t: int, decay: float, ratio_cap: float, trace_cap: float) -> tuple[float, float]:
        def target(t: int) -> float:
            total, trace = self.values[t], 1.0
            for k in range(t, self.end(t) + 1):
                total += self.discount ** (k - t) * trace * min(ratio_cap, self.ratios[k]) * self.error(k)
                trace *= decay * min(trace_cap, self.ratios[k])
            return total

        following = self.next_value(t) if t == self.end(t) else target(t + 1)
        mixed = (1 - decay) * self.next_value(t) + decay * following
        advantage = min(ratio_cap, self.ratios[t]) * (self.rewards[t] + self.discount * mixed - self.values[t])
        return target(t), advantage


def by_definition(x: SimpleNamespace, discount: float, function) -> torch.Tensor:
    time, batch = x.rewards.shape
    columns = [Reference(x, b, discount) for b in range(batch)]
    return double([[function(c, t) for c in columns] for t in range(time)])


# The scan


def plain_loop(factors: torch.Tensor, increments: torch.Tensor) -> torch.Tensor:
    found, following = increments.clone(), torch.zeros_like(increments[0])
    for t in reversed(range(len(found))):
        following = found[t] = increments[t] + factors[t] * following
    return found


LENGTHS = [1, 2, STEPS_PER_BLOCK, LONGEST_PLAIN_SCAN, LONGEST_PLAIN_SCAN + 1, 96, 97, 1009, 4099]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", LENGTHS)
def test_scan_equals_the_plain_loop(time, batch):
    generator = torch.Generator().manual_seed(time)
    factors = 2 * torch.rand(time, batch, dtype=torch.float64, generator=generator) - 1
    factors[torch.rand(time, batch, generator=generator) < 0.1] = 0
    factors[torch.rand(time, batch, generator=generator) < 0.1] = 1e-200  # their products underflow
    factors[torch.rand(time, batch, generator=generator) < 0.5] = 1.0
    increments = torch.randn(time, batch, dtype=torch.float64, generator=generator)
    kept = factors.clone(), increments.clone()
    found = reverse_scan(factors, increments)
    torch.testing.assert_close(found, plain_loop(factors, increments), rtol=1e-13, atol=1e-13)
    assert torch.equal(factors, kept[0])
    assert torch.equal(increments, kept[1])


def test_scan_without_steps_or_columns():
    assert reverse_scan(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)
    assert reverse_scan(torch.zeros(100, 0), torch.zeros(100, 0)).shape == (100, 0)


def test_products_that_overflow_lose_no_finite_result():
    factors, increments = torch.full((200, 2), 1e30), torch.zeros(200, 2)
    factors[:2], factors[66, 0] = 0, 0  # after the overflow of their block: ∞ · 0
    increments[3], increments[69, 0] = 1, 1e-30
    found = reverse_scan(factors, increments)
    torch.testing.assert_close(found, plain_loop(factors, increments))
    assert found.isfinite().all()
    assert found[2].tolist() == pytest.approx([1e30, 1e30])


@pytest.mark.parametrize("time", [9, 200, 4099])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_factor_of_zero_cuts_whatever_follows(time, bad):
    generator = torch.Generator().manual_seed(time)
    factors = torch.rand(time, 3, dtype=torch.float64, generator=generator)
    increments = torch.randn(time, 3, dtype=torch.float64, generator=generator)
    end, where = 2 * time // 3, 2 * time // 3 + 2
    factors[end, :2] = 0
    expected = reverse_scan(factors, increments)
    spoiled = increments.clone()
    spoiled[where] = bad
    found = reverse_scan(factors, spoiled)
    torch.testing.assert_close(found[: end + 1, :2], expected[: end + 1, :2], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[where + 1 :], expected[where + 1 :], rtol=1e-13, atol=1e-13)
    assert not found[end + 1 : where + 1].isfinite().any()
    assert not found[: where + 1, 2].isfinite().any()  # not cut: nothing is hidden


def test_factors_whose_product_is_zero_cut_nothing():
    factors, increments = torch.full((200, 1), 1e-30), torch.ones(200, 1)
    increments[-1] = NAN
    assert reverse_scan(factors, increments).isnan().all()
    increments[-1] = INF
    assert reverse_scan(factors, increments).isposinf().all()


def test_scan_takes_few_steps_over_many_numbers():
    """A step loop launches one operation per step, 65,536 here, and that is all its time."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            self.operations += name in ("addcmul", "mul_")
            return function(*args, **(kwargs or {}))

    with Count() as count:
        reverse_scan(torch.full((65_536, 2), 0.9), torch.ones(65_536, 2))
    assert 64 < count.operations < 400


# Time-major


def test_by_hand():
    """γ = ½: a terminated episode of two steps, a truncated one of one, and one that the rollout cuts."""
    rewards, next_values = column(1, 2, 4, 8, 16), column(10, NAN, 20, 30, 40)
    values, ends = column(1, 2, 3, 4, 5), (flags(0, 1, 0, 0, 0), flags(0, 0, 1, 0, 0))
    # 1 + ½·2, 2 | 4 + ½·20 | 8 + ½·36, 16 + ½·40
    expected = column(2, 2, 14, 26, 36)
    assert torch.equal(discounted_returns(rewards, next_values, *ends, discount=0.5), expected)
    assert torch.equal(n_step_returns(rewards, next_values, *ends, discount=0.5, steps=2), expected)
    # 1 + ½·10, 2 | 14 | 8 + ½·30, 36
    one_step = column(6, 2, 14, 23, 36)
    assert torch.equal(n_step_returns(rewards, next_values, *ends, discount=0.5, steps=1), one_step)
    # 1 + ½·(½·10 + ½·2), 2 | 14 | 8 + ½·(½·30 + ½·36), 36
    mixed = column(4, 2, 14, 24.5, 36)
    assert torch.equal(lambda_returns(rewards, next_values, *ends, discount=0.5, trace_decay=0.5), mixed)
    # δ = 5, 0 | 11 | 19, 31;  A = 5 + ¼·0, 0 | 11 | 19 + ¼·31, 31
    advantages = generalized_advantage(rewards, values, next_values, *ends, discount=0.5, trace_decay=0.5)
    assert torch.equal(advantages, column(5, 0, 11, 26.75, 31))
    # ρ = 1, ½ | 1 | 1, ½;  v − V = 5 + ½·0, 0 | 11 | 19 + ½·15½, 15½;  A = ρ·(δ + ½·next)
    ratios = column(2, 0.5, 1, 4, 0.5)
    targets, advantages = v_trace(rewards, values, next_values, ratios, *ends, discount=0.5)
    assert torch.equal(targets, column(6, 2, 14, 30.75, 20.5))
    assert torch.equal(advantages, column(5, 0, 11, 26.75, 15.5))


def test_truncation_bootstraps_and_termination_does_not():
    rewards, next_values, done, not_done = column(1, 1), column(5, 7), flags(0, 1), flags(0, 0)
    options = {"discount": 0.9}
    assert discounted_returns(rewards, next_values, done, not_done, **options).flatten().tolist() == [1.9, 1.0]
    cut = discounted_returns(rewards, next_values, not_done, done, **options).flatten().tolist()
    assert cut == pytest.approx([1 + 0.9 * 7.3, 7.3], rel=1e-15)
    # Both flags at once: the episode is over all the same.
    assert torch.equal(
        discounted_returns(rewards, next_values, done, done, **options),
        discounted_returns(rewards, next_values, done, not_done, **options),
    )


def test_the_value_of_an_endless_reward_of_one_needs_the_time_limit_handled():
    discount, limit = 0.9, 5
    rewards = torch.ones(200, 1, dtype=torch.float64)
    at_limit, never = (torch.arange(200) % limit == limit - 1)[:, None], torch.zeros(200, 1, dtype=torch.bool)
    value = wrong = 0.0
    for _ in range(120):  # each time V becomes the mean return under the last V
        value = discounted_returns(rewards, torch.full_like(rewards, value), never, at_limit, discount=discount).mean()
        wrong = discounted_returns(rewards, torch.full_like(rewards, wrong), at_limit, never, discount=discount).mean()
    assert value.item() == pytest.approx(1 / (1 - discount), rel=1e-8)
    mean_of_cut_sums = sum((1 - discount**k) / (1 - discount) for k in range(1, limit + 1)) / limit
    assert wrong.item() == pytest.approx(mean_of_cut_sums, rel=1e-12)
    assert wrong < 3


@settings(max_examples=25)
@given(trajectories, fractions, fractions, st.integers(1, 12))
def test_everything_equals_its_definition(x, discount, decay, n):
    def check(found, function):
        torch.testing.assert_close(found, by_definition(x, discount, function), **EXACT)

    check(discounted_returns(*steps_of(x), discount=discount), lambda c, t: c.n_step(t, 10**6))
    check(n_step_returns(*steps_of(x), discount=discount, steps=n), lambda c, t: c.n_step(t, n))
    check(lambda_returns(*steps_of(x), discount=discount, trace_decay=decay), lambda c, t: c.lambda_return(t, decay))
    check(gae_of(x, discount=discount, trace_decay=decay), lambda c, t: c.advantage(t, decay))


@settings(max_examples=25)
@given(trajectories, fractions, fractions, st.sampled_from([(1.0, 1.0), (2.0, 0.5), (1.5, 1.5), (INF, 1.0)]))
def test_v_trace_equals_its_definition(x, discount, decay, caps):
    options = {"discount": discount, "trace_decay": decay, "ratio_cap": caps[0], "trace_cap": caps[1]}
    found = v_trace_of(x, **options)
    for index in range(2):
        expected = by_definition(x, discount, lambda c, t, i=index: c.v_trace(t, decay, *caps)[i])
        torch.testing.assert_close(found[index], expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=50)
@given(trajectories, fractions)
def test_the_ends_of_lambda(x, discount):
    """λ = 1 is the discounted return, less V for GAE; λ = 0 the TD(0) target, less V the TD error."""
    returns = discounted_returns(*steps_of(x), discount=discount)
    one_step = n_step_returns(*steps_of(x), discount=discount, steps=1)
    torch.testing.assert_close(lambda_returns(*steps_of(x), discount=discount, trace_decay=1.0), returns, **EXACT)
    torch.testing.assert_close(lambda_returns(*steps_of(x), discount=discount, trace_decay=0.0), one_step, **EXACT)
    torch.testing.assert_close(gae_of(x, discount=discount, trace_decay=1.0), returns - x.values, **EXACT)
    torch.testing.assert_close(gae_of(x, discount=discount, trace_decay=0.0), one_step - x.values, **EXACT)
    torch.testing.assert_close(n_step_returns(*steps_of(x), discount=discount, steps=len(x.rewards)), returns, **EXACT)


@settings(max_examples=50)
@given(trajectories, fractions, fractions, st.sampled_from([1.0, 3.0, INF]))
def test_on_policy_v_trace_is_the_lambda_return_and_gae(x, discount, decay, cap):
    x.ratios = torch.ones_like(x.ratios)
    targets, advantages = v_trace_of(x, discount=discount, trace_decay=decay, ratio_cap=cap)
    returns = lambda_returns(*steps_of(x), discount=discount, trace_decay=decay)
    torch.testing.assert_close(targets, returns, **EXACT)
    torch.testing.assert_close(advantages, gae_of(x, discount=discount, trace_decay=decay), **EXACT)
    torch.testing.assert_close(advantages, returns - x.values, **EXACT)


@settings(max_examples=50)
@given(trajectories, fractions, st.integers(0, 2**32))
def test_a_perfect_critic_leaves_nothing_to_learn(x, discount, seed):
    """With V the discounted return itself every TD error is 0, and every λ, n and ratio gives V back."""
    x.values = discounted_returns(*steps_of(x), discount=discount)
    goes_on = ~(x.terminated | x.truncated)[:-1]
    x.next_values[:-1] = torch.where(goes_on, x.values[1:], x.next_values[:-1])
    for found in (
        n_step_returns(*steps_of(x), discount=discount, steps=3),
        lambda_returns(*steps_of(x), discount=discount, trace_decay=0.7),
        v_trace_of(x, discount=discount)[0],
    ):
        torch.testing.assert_close(found, x.values, **EXACT)
    torch.testing.assert_close(gae_of(x, discount=discount, trace_decay=0.7), torch.zeros_like(x.values), **EXACT)


@settings(max_examples=25)
@given(trajectories, fractions, fractions)
def test_columns_and_episodes_do_not_touch(x, discount, decay):
    options = {"discount": discount, "trace_decay": decay}
    whole = gae_of(x, **options)
    for b in range(whole.shape[1]):
        alone = gae_of(SimpleNamespace(**{name: tensor[:, b : b + 1] for name, tensor in vars(x).items()}), **options)
        torch.testing.assert_close(alone[:, 0], whole[:, b], **EXACT)
        ends = (x.terminated | x.truncated)[:, b].nonzero()[:, 0].tolist()
        for end in ends:  # what comes after an end has no say in what came before
            before = SimpleNamespace(**{name: tensor[: end + 1, b : b + 1] for name, tensor in vars(x).items()})
            torch.testing.assert_close(gae_of(before, **options)[:, 0], whole[: end + 1, b], **EXACT)


@pytest.mark.parametrize("time", [12, 300])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_spoiled_step_after_an_end_leaves_the_episodes_before_it(time, bad):
    """As where a step that only resets has no reward: the caller masks that step, and no other."""
    x = trajectory(3, time, 2, ends=0)
    x.ratios = torch.full_like(x.ratios, 1.5)
    end = time // 2
    x.terminated[end, 0] = x.truncated[end, 1] = True
    options = {"discount": 0.9, "trace_decay": 0.8}

    def everything() -> list[torch.Tensor]:
        return [
            discounted_returns(*steps_of(x), discount=0.9),
            n_step_returns(*steps_of(x), discount=0.9, steps=3),
            lambda_returns(*steps_of(x), **options),
            gae_of(x, **options),
            *v_trace_of(x, **options, ratio_cap=2.0, trace_cap=2.0),
        ]

    expected = everything()
    x.rewards[end + 1] = bad
    for found, whole in zip(everything(), expected, strict=True):
        torch.testing.assert_close(found[: end + 1], whole[: end + 1], **EXACT)
        torch.testing.assert_close(found[end + 2 :], whole[end + 2 :], **EXACT)
        assert not found[end + 1].isfinite().any()


@pytest.mark.parametrize("time", [12, 300])
def test_v_trace_with_ratios_beyond_all_bounds(time):
    """Capped they are ordinary; uncapped an infinite one spoils its own episode and no other."""
    x = trajectory(4, time, 2, ends=0)
    x.ratios = torch.full_like(x.ratios, 1.2)
    end = time // 2
    x.terminated[[3, end]] = True
    x.next_values = x.next_values.masked_fill(x.terminated, NAN)
    capped = v_trace_of(x, discount=0.9)
    x.ratios[end] = 1e30
    for found, expected in zip(v_trace_of(x, discount=0.9), capped, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    uncapped = v_trace_of(x, discount=0.9, ratio_cap=INF, trace_cap=INF)
    assert all(found[:4].isfinite().all() and found[end + 1 :].isfinite().all() for found in uncapped)
    assert uncapped[0][end].abs().min() > 1e25
    x.ratios[end] = INF
    for found, expected in zip(v_trace_of(x, discount=0.9), capped, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    found = v_trace_of(x, discount=0.9, ratio_cap=INF, trace_cap=INF)
    for infinite, huge in zip(found, uncapped, strict=True):
        assert infinite[end].isinf().all()
        torch.testing.assert_close(infinite[:4], huge[:4], **EXACT)
        torch.testing.assert_close(infinite[end + 1 :], huge[end + 1 :], **EXACT)


def test_gae_plus_values_is_the_lambda_return_only_where_the_next_value_is_the_next_steps():
    rewards, values, never = column(1, 1), column(0, 5), flags(0, 0)
    for next_values, same in ((column(5, 7), True), (column(6, 7), False)):
        options = {"discount": 0.9, "trace_decay": 0.5}
        advantages = generalized_advantage(rewards, values, next_values, never, never, **options)
        returns = lambda_returns(rewards, next_values, never, never, **options)
        assert torch.allclose(advantages + values, returns, rtol=1e-14) == same


def test_returns_read_values_only_where_the_sum_ends():
    next_values = column(NAN, INF, 3, NAN, 5)
    ends = flags(0, 0, 0, 1, 0), flags(0, 0, 1, 0, 0)
    assert discounted_returns(column(1, 1, 1, 1, 1), next_values, *ends, discount=1.0).isfinite().all()


def test_long_rollouts_keep_float32_accuracy():
    x = trajectory(5, 3001, 4, ends=0.002)
    options = {"discount": 0.999, "trace_decay": 0.99}
    exact = gae_of(x, **options)
    single = SimpleNamespace(**{n: t.float() if t.is_floating_point() else t for n, t in vars(x).items()})
    found = gae_of(single, **options)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_results_are_detached_and_of_the_widest_dtype():
    x = trajectory(1, 70, 2)
    for name in ("rewards", "values", "next_values", "ratios"):
        setattr(x, name, getattr(x, name).bfloat16().requires_grad_())
    options = {"discount": 0.9, "trace_decay": 0.5}

    def everything() -> list[torch.Tensor]:
        return [
            discounted_returns(*steps_of(x), discount=0.9),
            n_step_returns(*steps_of(x), discount=0.9, steps=2),
            lambda_returns(*steps_of(x), **options),
            gae_of(x, **options),
            *v_trace_of(x, **options),
        ]

    found = everything()
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in found)
    x.rewards = x.rewards.double()
    for wide, narrow in zip(everything(), found, strict=True):
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide, narrow.double(), rtol=1e-4, atol=1e-4)


def test_no_steps_no_environments_one_step():
    for shape in [(0, 3), (3, 0), (1, 1)]:
        zeros, never = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        options = {"discount": 0.9, "trace_decay": 0.5}
        assert generalized_advantage(zeros, zeros, zeros, never, never, **options).shape == shape
        assert lambda_returns(zeros, zeros, never, never, **options).shape == shape
        assert n_step_returns(zeros, zeros, never, never, discount=0.9, steps=4).shape == shape
        assert v_trace(zeros, zeros, zeros, zeros, never, never, **options)[1].shape == shape


def test_bad_input_is_named():
    good, never = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.bool)
    options = {"discount": 0.9, "trace_decay": 0.5}
    with pytest.raises(ValueError, match=r"values \[4, 1\], next_values \[4, 2\]"):
        generalized_advantage(good, good[:, :1], good, never, never, **options)
    with pytest.raises(ValueError, match=r"terminated is \[8\], expected time-major \[T, B\]"):
        lambda_returns(*(tensor.flatten() for tensor in (good, good, never, never)), **options)
    with pytest.raises(ValueError, match=r"truncated torch\.float32, expected torch\.bool"):
        discounted_returns(good, good, never, good, discount=0.9)
    for name, value in [("discount", 1.01), ("trace_decay", -0.1), ("discount", NAN)]:
        with pytest.raises(ValueError, match=f"{name} is {value}, expected a number in"):
            generalized_advantage(good, good, good, never, never, **options | {name: value})
    with pytest.raises(ValueError, match="steps is 0"):
        n_step_returns(good, good, never, never, discount=0.9, steps=0)
    for caps in [(1.0, 2.0), (1.0, -1.0), (NAN, 1.0)]:
        with pytest.raises(ValueError, match="expected ratio_cap ≥ trace_cap ≥ 0"):
            v_trace(good, good, good, good, never, never, discount=0.9, ratio_cap=caps[0], trace_cap=caps[1])
    with pytest.raises(ValueError, match=r"ratios \[4\]"):
        v_trace(good, good, good, good[:, 0], never, never, discount=0.9)
