"""From scores to the rewards and advantages of PPO's tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from taurl.functional.kl import k1, k2, k3
from taurl.functional.whitening import whiten, whiten_groups
from taurl.llm.algorithms.collecting import Collected
from taurl.llm.algorithms.ppo_config import PPOConfig
from taurl.llm.algorithms.ppo_state import Controls
from taurl.llm.scoring.rollouts import Rollout
from taurl.runtime.run import Record

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass
class Estimates:
    """What is known of each token before the updates, [N, L] each, 0 where it is not trained on.

    Attributes:
        rewards: what the token earned, less the price of its divergence from the reference.
        values: V of the state in which it was chosen.
        advantages: as they are trained on, whitened or not.
        returns: the critic's targets.
    """

    rewards: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def settled_rewards(collected: Collected, config: PPOConfig, controls: Controls) -> Tensor:
    """What each token earned, float64 [N, L]: normalised, clipped, and settled for completions that were cut off."""
    rewards, earned = collected.rewards.clone(), collected.earned
    last = torch.nn.functional.one_hot(collected.rollout.last.cpu(), rewards.shape[1]).bool()
    truncated = collected.rollout.truncated.cpu()[:, None]
    cut = last & truncated
    if config.truncated == "bootstrap" and collected.episodes is None:
        earned = earned & ~cut  # the score of a whole answer, which this is not
        rewards[cut] = 0.0
    elif config.truncated == "mask":
        earned = earned & ~truncated  # what is not trained on has no part in the scale
    if config.normalize_rewards:
        # From every turn a mean would be taken as often as an episode has turns, so that longer ones lost by it.
        rewards[earned] = controls.normalize(rewards[earned], centered=collected.episodes is None)
    if config.reward_clip is not None:
        rewards = rewards.clamp(-config.reward_clip, config.reward_clip)
    if config.truncated == "penalty":
        rewards[cut] -= config.missing_eos_penalty
    return rewards


def kl_prices(rollout: Rollout, config: PPOConfig, beta: float) -> Tensor:
    """β times each token's divergence from the reference, [N, L]."""
    assert rollout.old_logprobs is not None
    assert rollout.reference_logprobs is not None
    return beta * ESTIMATORS[config.kl_estimator](rollout.old_logprobs, rollout.reference_logprobs)


def kl_figures(rollout: Rollout, beta: float) -> Record:
    """How far the policy that sampled is from the reference, and what a nat of it costs."""
    assert rollout.old_logprobs is not None
    assert rollout.reference_logprobs is not None
    given = rollout.old_logprobs, rollout.reference_logprobs  # both 0 where masked
    rows, tokens = max(1, int(rollout.mask.any(1).sum())), max(1, int(rollout.mask.sum()))
    return {
        "kl": float(k3(*given).sum() / tokens),
        "kl_per_completion": float(k1(*given).sum() / rows),
        "kl_coefficient": beta,
    }


def whitened(advantages: Tensor, mask: Tensor, config: PPOConfig) -> Tensor:
    """Advantages [N, L] as they are trained on."""
    match config.whiten:
        case "batch":
            return whiten(advantages, mask)
        case "group":
            return whiten_groups(advantages, mask, group_size=config.group_size)
        case "none":
            return advantages
