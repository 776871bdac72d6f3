"""Advantages of one policy from episodes that another one played."""

import torch
from torch import Tensor

from taurl.functional._inputs import of_one_dtype, require_same_shape, require_steps
from taurl.functional.returns import discounted_returns


@torch.no_grad()
def per_decision_advantages(
    rewards: Tensor,
    baselines: Tensor,
    next_values: Tensor,
    weights: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float,
) -> Tensor:
    """Reward-to-go above a baseline, each term with the weight of the decisions that led to it.

        A_t = Σ_{k≥t} γ^{k−t} · w_k · r_k − w_t · b_t,   w_k = Π_{t' ≤ k} π(a_t'|s_t') / μ(a_t'|s_t')

    E_μ[ Σ_t A_t · ∇log π(a_t|s_t) ] is the policy gradient of π, for γ < 1 without the factor γ^t of step t, as is
    usual: w_t brings state and action to π, and the factors after it what follows. It does not depend on b, which may
    depend on s_t but not on a_t. With all w = 1 it is `discounted_returns` minus b.

    Each column is one episode from its beginning; what stands after its end is for the caller to mask.

    Args:
        rewards, baselines: float [T, B].
        next_values: float [T, B], V of the state that followed where truncated or at the end, as in
            `discounted_returns`; not read where terminated.
        weights: float [T, B], w; `importance.per_decision_log_weights`, clamped to ±LARGEST_LOG_RATIO and
            exponentiated.
        terminated, truncated: bool [T, B].
        discount: γ in [0, 1].
    Returns: advantages, [T, B].
    Raises: ValueError if shapes or dtypes do not fit or γ is outside [0, 1].
    Source: Precup, Sutton and Singh 2000, "Eligibility Traces for Off-Policy Policy Evaluation", applied to the
        gradient of Williams 1992.
    """
    require_same_shape(rewards=rewards, baselines=baselines, next_values=next_values, weights=weights)
    require_steps(terminated, truncated, rewards=rewards)
    rewards, baselines, next_values, weights = of_one_dtype(rewards, baselines, next_values, weights)
    following = torch.where(terminated, 0.0, next_values) * weights
    returns = discounted_returns(rewards * weights, following, terminated, truncated, discount=discount)
    return returns - weights * baselines
