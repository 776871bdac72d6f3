"""GRPO without a language model: group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

`steps`, `_play`, `_update` and `_loss` are the algorithm, in this order; its mathematics is called from
`taurl.functional`, by the names that the LLM wing calls. P beginnings with G episodes each make N = P · G rows of at
most L steps: a beginning is a prompt, an episode a completion, a step a token.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taurl.control.algorithms.grpo_config import GRPOConfig
from taurl.control.environments import SingleEpisodes
from taurl.control.policies import Policy
from taurl.control.rollouts import Collector, Rollout
from taurl.control.trainer import Trainer
from taurl.control.updates import FlatAdam
from taurl.functional.advantages import group_relative, has_variance
from taurl.functional.aggregation import weighted_sum
from taurl.functional.kl import k3
from taurl.functional.loss_types import clipped_tokens, loss_weights, policy_loss
from taurl.functional.returns import discounted_returns
from taurl.runtime.run import Record


class Episodes(NamedTuple):
    """N whole episodes as rows, padded to the longest.

    observations: float [N, L, d].
    actions: [N, L] or [N, L, K].
    logprobs: float [N, L], under the policy that acted.
    mask: bool [N, L], the steps that count.
    advantages: float [N, 1].
    """

    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    mask: Tensor
    advantages: Tensor


class GRPO(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "grpo"
    config_class = GRPOConfig
    environments_class = SingleEpisodes
    one_copy_will_do = False  # a group is of several episodes
    config: GRPOConfig
    environments: SingleEpisodes

    def set_up(self) -> None:
        self.policy = Policy.create(self.environments, self.config)
        self.optimizer = FlatAdam({"actor": self.policy.actor}, self._loss, self.config)
        self.collector = Collector(self.environments, self.policy.distribution, self.policy.normalizer)
        self.state = {"optimizer": self.optimizer, "normalizer": self.policy.normalizer}

    def steps(self) -> Iterator[Record]:
        config = self.config
        with self.begin():
            for step in self.run.steps():
                taken, wanted = 0, min(config.record_every, config.steps - self.run.step)
                while taken < wanted:
                    with step.phase("rollout", "acting"):
                        rollout = self._play(self.run.step + taken)
                    with step.phase("update", "updating"):
                        figures = self._update(rollout, self.run.step + taken + 1)
                    # Those count too that a copy is stepped on with while it waits for the longest episode.
                    taken += rollout.valid.numel()
                step.number = self.run.step + taken
                yield self.finish(step, figures)

    def _play(self, step: int) -> Rollout:
        """One episode of every copy, each group's from one seed of its own, which is drawn from run and step."""
        config = self.config
        groups = config.environments // config.group_size
        seeds = np.random.default_rng([config.seed, step]).integers(2**31, size=groups).repeat(config.group_size)
        return self.collector.collect_episodes(
            self.policy.actor, None, seeds=seeds.tolist(), longest=config.max_episode_steps
        )

    def _update(self, rollout: Rollout, first: int) -> Record:
        """Advantages within the groups, then epochs of minibatches."""
        config = self.config
        # No critic: next_values are 0, and a return ends where its episode was cut.
        ends = (rollout.next_values, rollout.terminated, rollout.truncated)
        returns = discounted_returns(rollout.rewards, *ends, discount=config.discount)[0]
        returns = returns.reshape(-1, config.group_size)
        advantages = group_relative(returns, scale=config.scale_rewards)
        mask = rollout.valid
        if config.mask_truncated:
            mask = mask & rollout.terminated.any(0)
        observations, actions, logprobs, mask = (
            column.transpose(0, 1) for column in (rollout.observations, rollout.actions, rollout.logprobs, mask)
        )
        episodes = Episodes(observations, actions, logprobs, mask, advantages.reshape(-1, 1))
        rate = self.rate_of(first, rollout.valid.numel())
        norms: list[float] = []
        figures: list[dict[str, Tensor]] = []
        for _ in range(config.epochs):
            for rows in torch.tensor_split(torch.randperm(config.environments), config.minibatches):
                norm, found = self.optimizer.update(rate, Episodes(*(column[rows] for column in episodes)))
                norms.append(norm)
                figures.append(found)
        means = {name: torch.stack([one[name] for one in figures]).mean().item() for name in figures[0]}
        return means | {
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": rate,
            "reward": float(returns.mean()),
            "reward_std": float(returns.std(1).mean()),
            "frac_reward_zero_std": 1 - float(has_variance(returns).float().mean()),
        }

    def _loss(self, episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one minibatch, from [n, L], and its figures."""
        config, distribution, mask = self.config, self.policy.distribution, episodes.mask
        weights = loss_weights(config.loss_type, mask, max_tokens=config.max_episode_steps)
        parameters = self.policy.actor(episodes.observations[mask])  # of the steps that count, and of no padding
        found = distribution.logprobs(parameters, episodes.actions[mask])
        logprobs = torch.zeros(mask.shape).masked_scatter(mask, found)
        given = (config.loss_type, logprobs, episodes.logprobs, episodes.advantages, mask)
        clip_low, clip_high = config.clip_low, config.clip_high
        loss = weighted_sum(policy_loss(*given, clip_low=clip_low, clip_high=clip_high), weights)
        with torch.no_grad():
            low, high = clipped_tokens(*given, clip_low=clip_low, clip_high=clip_high)
            values = {
                "entropy": distribution.entropy(parameters),
                "train/approx_kl": k3(episodes.logprobs[mask], found),  # of KL(π_old ‖ π)
                "clip_ratio/low_mean": low[mask],
                "clip_ratio/high_mean": high[mask],
            }
            figures = {name: value.sum() / max(1, len(found)) for name, value in values.items()}
        return loss, {"loss": loss.detach(), **figures}
