"""REINFORCE: the policy gradient from whole episodes (Williams 1992), on-policy and off-policy.

`steps`, `_iterate`, `_loss` and `_weighted` are the algorithm, in this order; its mathematics is called from
`taurl.functional`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from taurl.control.algorithms.reinforce_config import REINFORCEConfig
from taurl.control.environments import SingleEpisodes
from taurl.control.networks import Critic
from taurl.control.policies import Policy
from taurl.control.rollouts import Collector, Rollout
from taurl.control.trainer import Trainer
from taurl.control.updates import FlatAdam
from taurl.functional.importance import (
    LARGEST_LOG_RATIO,
    effective_sample_size,
    per_decision_log_weights,
    trajectory_log_weights,
)
from taurl.functional.off_policy import per_decision_advantages
from taurl.functional.returns import discounted_returns
from taurl.functional.surrogates import reinforce
from taurl.functional.value_losses import explained_variance, squared_value_loss
from taurl.runtime.run import Record

RETAINED = 0.9  # of the moving mean at each iteration


class MovingMean:
    """The constant baseline: the mean reward-to-go of earlier iterations, recent ones most; NaN before the first."""

    def __init__(self) -> None:
        self.value = torch.tensor(torch.nan, dtype=torch.float64)
        self.changes = 0

    def update(self, mean: Tensor) -> None:
        mean = mean.double()
        self.value = mean if self.value.isnan() else mean.lerp(self.value, RETAINED)
        self.changes += 1

    def tensors(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.value = tensors["value"]


class Episodes(NamedTuple):
    """B whole episodes, time-major, [T, B] each; `rollout.valid` without what does not count."""

    rollout: Rollout
    returns: Tensor
    baselines: Tensor
    counted: Tensor


class REINFORCE(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "reinforce"
    config_class = REINFORCEConfig
    environments_class = SingleEpisodes
    config: REINFORCEConfig

    def set_up(self) -> None:
        config = self.config
        self.policy = Policy.create(self.environments, config)
        self.optimizer = FlatAdam({"actor": self.policy.actor}, self._loss, config)
        self.state = {"optimizer": self.optimizer, "normalizer": self.policy.normalizer}
        self.critic: Critic | None = None
        if config.baseline == "learned":
            self.critic = Critic(self.policy.width, config.hidden, config.activation)
            self.critic_optimizer = FlatAdam({"critic": self.critic}, self._critic_loss, config)
            self.state["critic"] = self.critic_optimizer
        if config.baseline == "constant":
            self.state["baseline"] = self.moving_mean = MovingMean()
        self.collector = Collector(self.environments, self.policy.distribution, self.policy.normalizer)

    def steps(self) -> Iterator[Record]:
        config = self.config
        with self.begin():
            for step in self.run.steps():
                taken, wanted = 0, min(config.record_every, config.steps - self.run.step)
                while taken < wanted:
                    with step.phase("rollout", "acting"):
                        rollout = self.collector.collect_episodes(
                            self.policy.actor, self.critic, longest=config.max_episode_steps
                        )
                    with step.phase("update", "updating"):
                        figures = self._iterate(rollout, self.run.step + taken + 1)
                    taken += rollout.valid.numel()
                step.number = self.run.step + taken
                yield self.finish(step, figures)

    def _iterate(self, rollout: Rollout, first: int) -> Record:
        """Returns and baselines, steps of the policy, then of the baseline."""
        config = self.config
        episodes = self._scored(rollout)
        rate = self.rate_of(first, rollout.valid.numel())
        for update in range(config.updates):
            norm, found = self.optimizer.update(rate, episodes, update == 0)
        if config.baseline == "constant" and episodes.counted.any():
            self.moving_mean.update(episodes.returns[episodes.counted].mean())
        if config.baseline == "learned":
            for _ in range(config.critic_updates):
                found |= self.critic_optimizer.update(config.critic_learning_rate, episodes)[1]
            explained = explained_variance(episodes.baselines, episodes.returns, rollout.valid)
            found["train/explained_variance"] = explained
        return {name: float(figure) for name, figure in found.items()} | {"grad_norm": norm, "learning_rate": rate}

    def _scored(self, rollout: Rollout) -> Episodes:
        config = self.config
        ends = rollout.terminated, rollout.truncated
        returns = discounted_returns(rollout.rewards, rollout.next_values, *ends, discount=config.discount)
        counted = rollout.valid
        if not config.count_truncated:
            counted = counted & ~rollout.truncated.any(0)
        baselines = rollout.values  # zeros without a critic
        if config.baseline == "constant":
            baselines = torch.full_like(returns, float(self.moving_mean.value.nan_to_num()))
        return Episodes(rollout, returns, baselines, counted)

    def _loss(self, episodes: Episodes, on_policy: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy gradient: the mean over the episodes that count of the sum over steps."""
        rollout, counted, distribution = episodes.rollout, episodes.counted, self.policy.distribution
        parameters = self.policy.actor(rollout.observations)
        logprobs = distribution.logprobs(parameters, rollout.actions)
        if on_policy:
            losses, weights = reinforce(logprobs, episodes.returns - episodes.baselines), torch.ones(logprobs.shape[1])
        else:
            losses, weights = self._weighted(logprobs, episodes)
        entropies = distribution.entropy(parameters)
        losses = torch.where(counted, losses - self.config.entropy_coefficient * entropies, 0.0)
        count = counted.any(0).sum().clamp(min=1)
        loss = losses.sum() / count
        figures = {
            "loss": loss.detach(),
            "entropy": entropies.detach()[rollout.valid].mean(),
            # Of the last update: how many of the episodes still count, 1 when all do alike.
            "train/effective_samples": effective_sample_size(weights, counted.any(0)) / count,
        }
        return loss, figures

    def _weighted(self, logprobs: Tensor, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The loss of episodes that an older policy played; also each episode's weight, [B]."""
        rollout = episodes.rollout
        rows = logprobs.detach().T, rollout.logprobs.T, rollout.valid.T  # a row is an episode
        of_episodes = bounded(trajectory_log_weights(*rows))
        if self.config.importance == "trajectory":
            advantages = episodes.returns - episodes.baselines
            return reinforce(logprobs, advantages, weights=of_episodes.expand_as(logprobs)), of_episodes
        advantages = per_decision_advantages(
            rollout.rewards,
            episodes.baselines,
            rollout.next_values,
            bounded(per_decision_log_weights(*rows)).T,
            rollout.terminated,
            rollout.truncated,
            discount=self.config.discount,
        )
        return reinforce(logprobs, advantages), of_episodes

    def _critic_loss(self, episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the critic is from the returns."""
        assert self.critic is not None
        valid = episodes.rollout.valid
        loss = squared_value_loss(self.critic(episodes.rollout.observations[valid]), episodes.returns[valid]).mean()
        return loss, {"train/value_loss": loss.detach()}


def bounded(log_weights: Tensor) -> Tensor:
    """The weights, finite."""
    return log_weights.clamp(max=LARGEST_LOG_RATIO).exp()
