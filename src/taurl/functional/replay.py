"""Learning from steps that are kept and drawn again: sums of rewards that followed a step, and priorities.

Shapes are [N], the steps of a batch; results are detached, float32, or float64 if an input is.
"""

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_fractions, require_same_shape


@torch.no_grad()
def n_step_sums(rewards: Tensor, steps: Tensor, *, discount: float) -> tuple[Tensor, Tensor]:
    """The rewards of the first m of n steps, discounted, and what a value after them counts.

        R = r_0 + γ · r_1 + … + γ^{m−1} · r_{m−1},   γ^m

    The target is then R + γ^m · (a value of the state that followed), as `values.td_target` and its kin take it.

    Args:
        rewards: float [n, N]; those after the first m are not read and may be anything.
        steps: int64 [N], m of each row, from 1 to n: fewer than n where the episode, or what is known of it, ends.
        discount: γ in [0, 1].
    Returns: R and γ^m, [N] both.
    Raises: ValueError if shapes do not fit, or m or γ is outside its range.
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 7.1; with Q: Hessel et al. 2018, arXiv:1710.02298.
    """
    require_same_shape(rewards_of_one_step=rewards[0], steps=steps)
    require_fractions(discount=discount)
    if len(steps) and not (steps.min() >= 1 and steps.max() <= len(rewards)):
        raise ValueError(f"steps are from {steps.min()} to {steps.max()}, expected 1 to {len(rewards)}")
    rewards = at_least_float32(rewards)
    places = torch.arange(len(rewards), device=rewards.device)[:, None]
    counted = torch.where(places < steps, rewards, 0.0)
    factors = torch.full_like(rewards[:, :1], discount).pow(places)
    return (factors * counted).sum(0), torch.full_like(rewards[0], discount).pow(steps)


@torch.no_grad()
def proportional_priorities(errors: Tensor, *, exponent: float, offset: float = 1e-6) -> Tensor:
    """p = (|δ| + ε)^α: a step is drawn with probability p / Σ p.

    Args:
        errors: float [N], δ, target − Q.
        exponent: α ≥ 0; 0 draws uniformly.
        offset: ε > 0, so that a step without error may still be drawn.
    Returns: priorities, [N].
    Raises: ValueError if α is negative or ε is not positive.
    Source: Schaul et al. 2016, arXiv:1511.05952, section 3.3.
    """
    if not (exponent >= 0 and offset > 0):
        raise ValueError(f"exponent is {exponent} and offset {offset}, expected at least 0, and more than 0")
    return (at_least_float32(errors).abs() + offset).pow(exponent)


@torch.no_grad()
def replay_weights(probabilities: Tensor, *, size: int, exponent: float) -> Tensor:
    """Importance weights that undo the preference for some steps, scaled so that the largest of the batch is 1.

        w = (N · P)^{−β} / max w

    The paper leaves open what the maximum is taken over; here it is the batch, as in the code of Rainbow's authors.

    Args:
        probabilities: float [N], P of each step drawn, positive.
        size: N, how many steps there are to draw from.
        exponent: β in [0, 1]; 1 undoes it wholly.
    Returns: weights, [N], at most 1.
    Raises: ValueError if β is outside [0, 1].
    Source: Schaul et al. 2016, arXiv:1511.05952, section 3.4.
    """
    require_fractions(exponent=exponent)
    weights = (size * at_least_float32(probabilities)).pow(-exponent)
    return weights / weights.max()
