"""Values: what V and Q should become (targets), and how Q, V and A hang together. Losses are in `value_losses`.

Shapes are free: one shape [..] for what belongs to a step, [.., A] for what belongs to each of A actions. Targets are
detached, the rest is differentiable where it says nothing else; float32, or float64 if an input is.

All targets have the form r + γ^n · (1 − terminated) · (a value of s_{t+n}). `discount` is γ^n: γ for one step; with
the sum of n discounted rewards as `rewards`, γ^n, or a tensor where some sums were cut short. A truncated step is
*not* terminated: its next state has a value like any other. Next values are never read where terminated and may be
anything there, NaN included. An action that is not allowed has Q = −∞.
"""

from typing import Literal

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, of_one_dtype, require_fractions, require_same_shape

DuelingBaseline = Literal["mean", "max"]


@torch.no_grad()
def td_target(rewards: Tensor, next_values: Tensor, terminated: Tensor, *, discount: float | Tensor) -> Tensor:
    """TD(0) target for V(s_t), r_t + γ · V(s_{t+1}).

    Args:
        rewards, next_values: float [..].
        terminated: bool [..].
        discount: γ^n in [0, 1], a number or float [..].
    Returns: targets, [..], detached.
    Raises: ValueError if shapes or dtypes do not fit or a discount is outside [0, 1].
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 6.1.
    """
    require_same_shape(rewards=rewards, next_values=next_values, terminated=terminated)
    if terminated.dtype != torch.bool:
        raise ValueError(f"terminated is {terminated.dtype}, expected torch.bool")
    if isinstance(discount, Tensor):
        require_same_shape(rewards=rewards, discount=discount)
        if not ((discount >= 0) & (discount <= 1)).all():
            raise ValueError(f"discount reaches from {discount.min()} to {discount.max()}, expected it in [0, 1]")
        rewards, next_values, discount = of_one_dtype(rewards, next_values, discount)
    else:
        require_fractions(discount=discount)
        rewards, next_values = of_one_dtype(rewards, next_values)
    return rewards + discount * torch.where(terminated, 0.0, next_values)


@torch.no_grad()
def q_learning_target(
    rewards: Tensor, next_action_values: Tensor, terminated: Tensor, *, discount: float | Tensor
) -> Tensor:
    """Q-learning target for Q(s_t, a_t), r_t + γ · max_a Q(s_{t+1}, a); DQN's with Q of the target network.

    Args:
        rewards: float [..].
        next_action_values: float [.., A].
        terminated: bool [..].
        discount: γ^n in [0, 1], a number or float [..].
    Returns: targets, [..], detached.
    Raises: ValueError if shapes or dtypes do not fit or a discount is outside [0, 1].
    Source: Watkins and Dayan 1992, "Q-learning", Machine Learning 8; target network: Mnih et al. 2015, "Human-level
        control through deep reinforcement learning", Nature 518.
    """
    _require_actions(next_action_values=next_action_values)
    return td_target(rewards, next_action_values.amax(-1), terminated, discount=discount)


@torch.no_grad()
def double_q_target(
    rewards: Tensor,
    next_online_action_values: Tensor,
    next_target_action_values: Tensor,
    terminated: Tensor,
    *,
    discount: float | Tensor,
) -> Tensor:
    """Double Q-learning target, r_t + γ · Q_target(s_{t+1}, argmax_a Q_online(s_{t+1}, a)).

    The maximum of noisy estimates is too high on average. One network chooses, another judges, so that the noise that
    made an action look best is not counted in its favour.

    Args:
        rewards: float [..].
        next_online_action_values, next_target_action_values: float [.., A].
        terminated: bool [..].
        discount: γ^n in [0, 1], a number or float [..].
    Returns: targets, [..], detached. Among equal online values the first action counts.
    Raises: ValueError if shapes or dtypes do not fit or a discount is outside [0, 1].
    Source: van Hasselt et al. 2016, arXiv:1509.06461.
    """
    _require_actions(
        next_online_action_values=next_online_action_values, next_target_action_values=next_target_action_values
    )
    best = next_online_action_values.argmax(-1)
    return sarsa_target(rewards, next_target_action_values, best, terminated, discount=discount)


@torch.no_grad()
def sarsa_target(
    rewards: Tensor, next_action_values: Tensor, next_actions: Tensor, terminated: Tensor, *, discount: float | Tensor
) -> Tensor:
    """SARSA target, r_t + γ · Q(s_{t+1}, a_{t+1}) with the action that was taken next.

    Args:
        rewards: float [..].
        next_action_values: float [.., A].
        next_actions: int64 [..], in [0, A); anything where terminated.
        terminated: bool [..].
        discount: γ^n in [0, 1], a number or float [..].
    Returns: targets, [..], detached.
    Raises: ValueError if shapes or dtypes do not fit or a discount is outside [0, 1]; torch's own error for an action
        that does not exist.
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 6.4.
    """
    _require_actions(next_action_values=next_action_values)
    if terminated.dtype != torch.bool:
        raise ValueError(f"terminated is {terminated.dtype}, expected torch.bool")
    if next_actions.dtype != torch.int64:
        raise ValueError(f"next_actions are {next_actions.dtype}, expected torch.int64")
    require_same_shape(
        rewards=rewards,
        next_values=next_action_values[..., 0],
        next_actions=next_actions,
        terminated=terminated,
    )
    taken = torch.where(terminated, 0, next_actions)[..., None]
    return td_target(rewards, next_action_values.gather(-1, taken)[..., 0], terminated, discount=discount)


@torch.no_grad()
def expected_sarsa_target(
    rewards: Tensor,
    next_action_values: Tensor,
    next_probabilities: Tensor,
    terminated: Tensor,
    *,
    discount: float | Tensor,
) -> Tensor:
    """Expected SARSA target, r_t + γ · Σ_a π(a|s_{t+1}) · Q(s_{t+1}, a).

    SARSA's target without the variance of the next action. The greedy policy makes it Q-learning's.

    Args:
        rewards: float [..].
        next_action_values: float [.., A].
        next_probabilities: float [.., A], π of any policy, as from `epsilon_greedy_probabilities` or a softmax.
        terminated: bool [..].
        discount: γ^n in [0, 1], a number or float [..].
    Returns: targets, [..], detached.
    Raises: ValueError if shapes or dtypes do not fit or a discount is outside [0, 1].
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 6.6.
    """
    return td_target(rewards, state_values(next_action_values, next_probabilities), terminated, discount=discount)


@torch.no_grad()
def epsilon_greedy_probabilities(action_values: Tensor, *, epsilon: float) -> Tensor:
    """π(a|s) of the policy that explores with probability ε and else takes an action of largest Q.

        π(a|s) = ε / |allowed| + (1 − ε) / |greedy| · [a is greedy],   0 where Q = −∞

    Equal maxima share. A policy that takes the first of them has other probabilities but the same expected Q.

    Args:
        action_values: float [.., A], at least one of each row above −∞.
        epsilon: ε in [0, 1].
    Returns: probabilities, [.., A], detached.
    Raises: ValueError if there are no actions or ε is outside [0, 1].
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 2.2.
    """
    _require_actions(action_values=action_values)
    require_fractions(epsilon=epsilon)
    action_values = at_least_float32(action_values)
    allowed = (action_values > -torch.inf).to(action_values.dtype)
    greedy = (action_values == action_values.amax(-1, keepdim=True)).to(action_values.dtype)
    return epsilon * allowed / allowed.sum(-1, keepdim=True) + (1 - epsilon) * greedy / greedy.sum(-1, keepdim=True)


def state_values(action_values: Tensor, probabilities: Tensor) -> Tensor:
    """V(s) = Σ_a π(a|s) · Q(s, a). An action of Q = −∞ and π = 0 counts nothing and gets no gradient.

    Args:
        action_values, probabilities: float [.., A].
    Returns: values, [..].
    Raises: ValueError if shapes differ or there are no actions.
    """
    _require_actions(action_values=action_values, probabilities=probabilities)
    action_values, probabilities = of_one_dtype(action_values, probabilities)
    excluded = (probabilities == 0) & action_values.isneginf()
    return (probabilities * torch.where(excluded, 0.0, action_values)).sum(-1)


@torch.no_grad()
def action_advantages(action_values: Tensor, values: Tensor) -> Tensor:
    """A(s, a) = Q(s, a) − V(s): how much better an action is than what the policy does on average.

    With V from `state_values` its mean under π is 0; with V = max_a Q it is 0 for the best action, negative for others.

    Args:
        action_values: float [.., A].
        values: float [..].
    Returns: advantages, [.., A], detached, as weights of a policy gradient are.
    Raises: ValueError if shapes do not fit or there are no actions.
    """
    _require_actions(action_values=action_values)
    require_same_shape(action_values_of_one_action=action_values[..., 0], values=values)
    action_values, values = of_one_dtype(action_values, values)
    return action_values - values[..., None]


def dueling_action_values(values: Tensor, advantages: Tensor, *, baseline: DuelingBaseline = "mean") -> Tensor:
    """Q from the two heads of a dueling network, one for the state and one for its actions.

        Q(s, a) = V(s) + A(s, a) − mean_a' A(s, a')     "mean"
        Q(s, a) = V(s) + A(s, a) − max_a' A(s, a')      "max"

    Without the baseline a constant could move between the heads. With "max", V is the value of the greedy action; with
    "mean", the paper's choice, V is off by a constant, and A need not follow every change of the best action.

    Args:
        values: float [..].
        advantages: float [.., A], finite: what is not allowed is masked in Q.
        baseline: what is subtracted from A.
    Returns: action values, [.., A], with a gradient to both heads.
    Raises: ValueError if shapes do not fit, there are no actions or the baseline is unknown.
    Source: Wang et al. 2016, arXiv:1511.06581, eq. 9 and 8.
    """
    _require_actions(advantages=advantages)
    require_same_shape(values=values, advantages_of_one_action=advantages[..., 0])
    values, advantages = of_one_dtype(values, advantages)
    match baseline:
        case "mean":
            centered = advantages - advantages.mean(-1, keepdim=True)
        case "max":
            centered = advantages - advantages.amax(-1, keepdim=True)
        case _:
            raise ValueError(f"baseline is {baseline!r}, expected 'mean' or 'max'")
    return values[..., None] + centered


def _require_actions(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected [.., A] with at least one action")
    require_same_shape(**tensors)
