"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347).

`steps`, `_iterate` and `_loss` are the algorithm, in this order; its mathematics is called from `taurl.functional`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.networks import Critic
from taurl.control.policies import Policy
from taurl.control.rollouts import Collector, Rollout
from taurl.control.trainer import Trainer
from taurl.control.updates import FlatAdam
from taurl.functional.aggregation import row_weights, weighted_sum
from taurl.functional.importance import token_ratios
from taurl.functional.returns import generalized_advantage
from taurl.functional.surrogates import clipped_surrogate
from taurl.functional.value_losses import clipped_value_loss, explained_variance, squared_value_loss
from taurl.functional.whitening import whiten
from taurl.runtime.optimization import learning_rate
from taurl.runtime.run import Record


class Minibatch(NamedTuple):
    """Some steps of a rollout, in any order: all that an update needs, [N, ..] each.

    Steps that only reset stay in, with weight 0: minibatches of one size are compiled once.
    """

    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    valid: Tensor


class PPO(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "ppo"
    config_class = PPOConfig
    config: PPOConfig

    def set_up(self) -> None:
        config = self.config
        self.policy = Policy.create(self.environments, config)
        inputs = self.policy.width
        self.critic = Critic(inputs, config.hidden, config.activation)
        trained = {"actor": self.policy.actor, "critic": self.critic}
        self.optimizer = FlatAdam(trained, self._loss, config, compiled=config.compile)
        self.collector = Collector(self.environments, self.policy.distribution, self.policy.normalizer)

    def steps(self) -> Iterator[Record]:
        config = self.config
        steps = config.rollout_steps * config.environments
        iterations = self.iterations(steps)
        with self.begin(optimizer=self.optimizer, normalizer=self.policy.normalizer):
            for step in self.run.steps(width=steps * iterations):
                for iteration in range(1, iterations + 1):
                    with step.phase("rollout", "acting"):
                        rollout = self.collector.collect(self.policy.actor, self.critic, config.rollout_steps)
                    with step.phase("update", "updating"):
                        figures = self._iterate(rollout, min(self.run.step + iteration * steps, config.steps))
                record = self.finish(step, figures)
                yield record
                if self.reached(record):
                    return

    def _iterate(self, rollout: Rollout, step: int) -> Record:
        """Advantages, then epochs of minibatches."""
        config = self.config
        advantages = generalized_advantage(
            rollout.rewards,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.truncated,
            discount=config.discount,
            trace_decay=config.trace_decay,
        )
        returns = advantages + rollout.values
        batch = flat(rollout, advantages, returns)
        rate, share = learning_rate(step, config), 1 - (step - 1) / config.steps
        clip = config.clip * share if config.anneal_clip else config.clip
        figures: list[dict[str, Tensor]] = []
        norms: list[float] = []
        whole = self._whitened(batch) if len(batch.actions) <= config.minibatch_size else None
        for _ in range(config.epochs):
            for minibatch in [whole] if whole else map(self._whitened, minibatches(batch, config.minibatch_size)):
                norm, found = self.optimizer.update(rate, minibatch, clip)
                norms.append(norm)
                figures.append(found)
            if config.target_kl is not None and figures[-1]["train/approx_kl"] > 1.5 * config.target_kl:
                break
        means = {name: torch.stack([one[name] for one in figures]).mean().item() for name in figures[0]}
        explained = float(explained_variance(rollout.values, returns, rollout.valid))
        means |= {"grad_norm": sum(norms) / len(norms), "train/explained_variance": explained, "learning_rate": rate}
        return means

    def _whitened(self, batch: Minibatch) -> Minibatch:
        """By the minibatch's own mean and deviation, as the reference code does."""
        if not self.config.whiten_advantages:
            return batch
        return batch._replace(advantages=whiten(batch.advantages, batch.valid))

    def _loss(self, batch: Minibatch, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate, value loss and entropy bonus of one minibatch."""
        config, distribution = self.config, self.policy.distribution
        parameters, values = self.policy.actor(batch.observations), self.critic(batch.observations)
        logprobs = distribution.logprobs(parameters, batch.actions)
        ratios = token_ratios(logprobs, batch.logprobs)
        weights = row_weights(batch.valid)
        surrogates = clipped_surrogate(ratios, batch.advantages, clip_low=clip, clip_high=clip)
        if config.value_clip is None:
            value_losses = squared_value_loss(values, batch.returns)
        else:
            value_losses = clipped_value_loss(values, batch.values, batch.returns, clip=config.value_clip)
        surrogate, value_loss, entropy = (
            weighted_sum(each, weights) for each in (surrogates, value_losses, distribution.entropy(parameters))
        )
        loss = surrogate + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
        with torch.no_grad():
            log_ratios = logprobs - batch.logprobs
            figures = {
                "loss": loss.detach(),
                "train/policy_loss": surrogate.detach(),
                "train/value_loss": value_loss.detach(),
                "entropy": entropy.detach(),
                "train/approx_kl": weighted_sum(log_ratios.expm1() - log_ratios, weights),  # k3 of KL(π_old ‖ π)
                "train/clip_fraction": weighted_sum(((ratios - 1).abs() > clip).float(), weights),
            }
        return loss, figures


def minibatches(batch: Minibatch, size: int) -> Iterator[Minibatch]:
    """The steps in an order drawn anew, `size` at a time."""
    for rows in torch.split(torch.randperm(len(batch.actions)), size):
        yield Minibatch(*(tensor[rows] for tensor in batch))


def flat(rollout: Rollout, advantages: Tensor, returns: Tensor) -> Minibatch:
    """All steps, [N, ..]. The weights of those that only reset are 0, and their figures finite."""
    columns = (rollout.observations, rollout.actions, rollout.logprobs, rollout.values, advantages, returns)
    return Minibatch(*(tensor.flatten(0, 1) for tensor in (*columns, rollout.valid)))
