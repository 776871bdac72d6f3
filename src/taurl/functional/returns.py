"""Returns: what a step led to, from the rewards that were sampled and the values of what was not.

Time-major [T, B]: T steps of B environments that reset when an episode is done, so that a column holds the end of one
episode, whole ones, and the start of another. Two ways to be done are kept apart. A *terminated* step has no future:
nothing is read from it, `next_values` may be NaN there, also where the step counts as truncated too. A *truncated* one
has a future that was not sampled, and so has the last step of the rollout: they bootstrap from `next_values[t]`, V of
the state that followed, before any reset. Steps that only reset are masked by the caller.

Nothing crosses an end: a NaN or infinity in one episode, or on a step that only resets, leaves the others as they are.

All results are targets, detached; float32, or float64 if an input is. They come from one recurrence, `reverse_scan`.
The same for rows of tokens is in `token_returns`.
"""

import torch
from torch import Tensor

from taurl.functional._inputs import of_one_dtype, require_fractions, require_steps
from taurl.functional._scan import reverse_scan


@torch.no_grad()
def discounted_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, *, discount: float
) -> Tensor:
    """Discounted return, the reward-to-go, R_t = Σ_{k≥0} γ^k · r_{t+k} over the rest of the episode.

        R_t = r_t                       terminated
              r_t + γ · V(s_{t+1})      truncated, or the last step of the rollout
              r_t + γ · R_{t+1}         otherwise

    Without a value function pass zeros as `next_values`: a truncated step then counts as if nothing followed, which is
    wrong for tasks that go on, and for the caller to know.

    Args:
        rewards: float [T, B].
        next_values: float [T, B], anything where the formula does not read it.
        terminated, truncated: bool [T, B].
        discount: γ in [0, 1].
    Returns: returns, [T, B].
    Raises: ValueError if shapes or dtypes do not fit or γ is outside [0, 1].
    Source: Sutton and Barto 2018, "Reinforcement Learning", chapter 3.
    """
    return lambda_returns(rewards, next_values, terminated, truncated, discount=discount, trace_decay=1.0)


@torch.no_grad()
def n_step_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, *, discount: float, steps: int
) -> Tensor:
    """n-step return: n rewards, then the value.

        G_t = r_t + γ · r_{t+1} + … + γ^{n−1} · r_{t+n−1} + γ^n · V(s_{t+n})

    An episode or rollout that ends sooner ends the sum there, with V where it is not terminated. n = 1 is the TD(0)
    target; n ≥ T the discounted return. Each of the n steps is one pass over [T, B].

    Args:
        rewards, next_values: float [T, B]; `next_values` is not read where terminated.
        terminated, truncated: bool [T, B].
        discount: γ in [0, 1].
        steps: n ≥ 1.
    Returns: returns, [T, B].
    Raises: ValueError if shapes or dtypes do not fit, γ is outside [0, 1] or n is below 1.
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 7.1.
    """
    require_steps(terminated, truncated, rewards=rewards, next_values=next_values)
    require_fractions(discount=discount)
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    rewards, next_values = of_one_dtype(rewards, next_values)
    one_step = torch.add(rewards, torch.where(terminated, 0.0, next_values), alpha=discount)
    goes_on = ~(terminated | truncated)[:-1]
    returns = one_step.clone()
    for _ in range(min(steps, len(rewards)) - 1):
        longer = torch.add(rewards[:-1], returns[1:], alpha=discount)
        returns[:-1] = torch.where(goes_on, longer, one_step[:-1])
    return returns


@torch.no_grad()
def lambda_returns(
    rewards: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float,
    trace_decay: float,
) -> Tensor:
    """λ-return: the n-step returns of all n, weighted (1 − λ)·λ^{n−1}, the longest one with what is left.

        G_t = r_t                                                  terminated
              r_t + γ · V(s_{t+1})                                 truncated, or the last step of the rollout
              r_t + γ · [ (1 − λ) · V(s_{t+1}) + λ · G_{t+1} ]     otherwise

    λ = 0 is the TD(0) target, λ = 1 the discounted return, which reads `next_values` only at the ends. If
    `next_values[t]` is `values[t + 1]` wherever the episode goes on, the λ-return is V(s_t) plus
    `generalized_advantage`.

    Args:
        rewards, next_values: float [T, B]; `next_values` is anything where the formula does not read it.
        terminated, truncated: bool [T, B].
        discount, trace_decay: γ and λ in [0, 1].
    Returns: returns, [T, B].
    Raises: ValueError if shapes or dtypes do not fit or a factor is outside [0, 1].
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 12.1.
    """
    require_steps(terminated, truncated, rewards=rewards, next_values=next_values)
    require_fractions(discount=discount, trace_decay=trace_decay)
    rewards, next_values = of_one_dtype(rewards, next_values)
    done = terminated | truncated
    done[-1:] = True  # where the rollout ends, no return follows either
    unread = terminated if trace_decay < 1 else ~done | terminated
    shares = torch.full_like(rewards, discount * (1 - trace_decay)).masked_fill_(done, discount)
    increments = torch.addcmul(rewards, shares, torch.where(unread, 0.0, next_values))
    return reverse_scan(_decays(done, rewards, discount * trace_decay), increments)


@torch.no_grad()
def generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float,
    trace_decay: float,
) -> Tensor:
    """Generalized advantage estimation, GAE(γ, λ).

        δ_t = r_t + γ · (1 − terminated_t) · V(s_{t+1}) − V(s_t)
        A_t = δ_t + γλ · (1 − done_t) · A_{t+1},   done = terminated or truncated

    A terminated step has no future; a truncated one has a future that was not sampled, so it bootstraps from V but the
    trace stops. A past the end of the rollout is 0. λ = 0 is the TD error. If `next_values[t]` is `values[t + 1]`
    wherever the episode goes on, A_t + V(s_t) is the λ-return, the critic's target, and with λ = 1 the discounted
    return.

    Stable-Baselines3 gets the same advantages by adding γ · V to the reward of a truncated step.

    Args:
        rewards, values, next_values: float [T, B]; `next_values[t]` is V of the state that followed, before any
            reset, and anything where terminated.
        terminated, truncated: bool [T, B].
        discount, trace_decay: γ and λ in [0, 1].
    Returns: advantages, [T, B].
    Raises: ValueError if shapes or dtypes do not fit or a factor is outside [0, 1].
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    require_steps(terminated, truncated, rewards=rewards, values=values, next_values=next_values)
    require_fractions(discount=discount, trace_decay=trace_decay)
    rewards, values, next_values = of_one_dtype(rewards, values, next_values)
    errors = _td_errors(rewards, values, next_values, terminated, discount)
    return reverse_scan(_decays(terminated | truncated, errors, discount * trace_decay), errors)


@torch.no_grad()
def v_trace(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    ratios: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float,
    trace_decay: float = 1.0,
    ratio_cap: float = 1.0,
    trace_cap: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace: value targets and policy-gradient advantages for π from steps that another policy μ took.

        ρ_t = min(ρ̄, π/μ),   c_t = λ · min(c̄, π/μ)
        δ_t = r_t + γ · V(s_{t+1}) − V(s_t)
        v_t = V(s_t) + ρ_t · δ_t + γ · c_t · (v_{t+1} − V(s_{t+1}))
        A_t = ρ_t · ( r_t + γ · [ (1 − λ) · V(s_{t+1}) + λ · v_{t+1} ] − V(s_t) )

    Ends are those of `generalized_advantage`: V(s_{t+1}) is 0 where terminated, and v_{t+1} is V(s_{t+1}) where nothing
    more was sampled; where a step goes on, A is this if `next_values[t]` is `values[t+1]`. ρ̄ decides what is estimated,
    V of π if nothing is cut; c̄ only how fast. On-policy (π = μ, caps at least 1), and with `next_values[t]` as in
    `lambda_returns`, v is the λ-return and A is GAE(γ, λ).

    The paper's advantage is the one of λ = 1, the default. For smaller λ it keeps v_{t+1} alone; mixed with V here,
    as rlax does, it keeps the last sentence true and lets λ trade bias for variance in both results.

    Args:
        rewards, values, next_values: float [T, B], as in `generalized_advantage`.
        ratios: float [T, B], π(a_t|s_t) / μ(a_t|s_t), not negative.
        terminated, truncated: bool [T, B].
        discount, trace_decay: γ and λ in [0, 1].
        ratio_cap, trace_cap: ρ̄ ≥ c̄ ≥ 0; `math.inf` for none.
    Returns: targets v and advantages A, [T, B] both.
    Raises: ValueError if shapes or dtypes do not fit, a factor is outside [0, 1], or not ρ̄ ≥ c̄ ≥ 0.
    Source: Espeholt et al. 2018, arXiv:1802.01561, section 4.
    """
    require_steps(terminated, truncated, rewards=rewards, values=values, next_values=next_values, ratios=ratios)
    require_fractions(discount=discount, trace_decay=trace_decay)
    if not ratio_cap >= trace_cap >= 0:
        raise ValueError(f"ratio_cap is {ratio_cap} and trace_cap {trace_cap}, expected ratio_cap ≥ trace_cap ≥ 0")
    rewards, values, next_values, ratios = of_one_dtype(rewards, values, next_values, ratios)
    errors = _td_errors(rewards, values, next_values, terminated, discount)
    decays = _decays(terminated | truncated, errors, discount * trace_decay)
    weights = ratios.clamp(max=ratio_cap)
    corrections = reverse_scan(_weighed(decays, ratios.clamp(max=trace_cap)), weights * errors)  # v_t − V(s_t)
    following = torch.cat([corrections[1:], torch.zeros_like(corrections[:1])])
    return values + corrections, weights * (errors + _weighed(decays, following))


def _td_errors(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, discount: float) -> Tensor:
    return torch.add(rewards, torch.where(terminated, 0.0, next_values), alpha=discount).sub_(values)


def _decays(done: Tensor, like: Tensor, decay: float) -> Tensor:
    """What a step takes over from the next one: `decay` of it, nothing where done."""
    return torch.full_like(like, decay).masked_fill_(done, 0.0)


def _weighed(decays: Tensor, numbers: Tensor) -> Tensor:
    """Their product, 0 where the decay is: a step that takes nothing over does not read what it would have taken."""
    return (decays * numbers).masked_fill_(decays == 0, 0.0)
