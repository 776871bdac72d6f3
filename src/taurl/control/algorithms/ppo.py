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
from taurl.functional.importance import token_ratios
from taurl.functional.returns import generalized_advantage
from taurl.functional.surrogates import clipped_surrogate
from taurl.functional.value_losses import clipped_value_loss, explained_variance, squared_value_loss
from taurl.functional.whitening import whiten
from taurl.runtime.optimization import Optimizer, learning_rate
from taurl.runtime.run import Record


class Minibatch(NamedTuple):
    """Some steps of a rollout, in any order: all that an update needs, [N, ..] each."""

    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


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
        named = [("actor", self.policy.actor), ("critic", self.critic)]
        parameters = [(f"{part}.{name}", p) for part, module in named for name, p in module.named_parameters()]
        self.optimizer = Optimizer(parameters, config)
        self.collector = Collector(self.environments, self.policy.distribution, self.policy.normalizer)

    def steps(self) -> Iterator[Record]:
        config = self.config
        steps = config.rollout_steps * config.environments
        iterations = self.iterations(steps)
        with self.run.begin(optimizer=self.optimizer, normalizer=self.policy.normalizer):
            for step in self.run.steps(width=steps * iterations):
                for iteration in range(1, iterations + 1):
                    with step.phase("rollout", "acting"):
                        rollout = self.collector.collect(self.policy.actor, self.critic, config.rollout_steps)
                    with step.phase("update", "updating"):
                        figures = self._iterate(rollout, self.run.step + iteration * steps)
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
        rate, share = learning_rate(step, config), max(0.0, 1 - step / config.steps)
        clip = config.clip * share if config.anneal_clip else config.clip
        figures: list[Record] = []
        for _ in range(config.epochs):
            for rows in torch.split(torch.randperm(len(batch.actions)), config.minibatch_size):
                minibatch = Minibatch(*(tensor[rows] for tensor in batch))
                with self.optimizer.update(rate) as backward:
                    loss, found = self._loss(minibatch, clip)
                    backward(loss)
                figures.append({"loss": backward.loss, "grad_norm": backward.grad_norm, **found})
            if config.target_kl is not None and figures[-1]["train/approx_kl"] > 1.5 * config.target_kl:
                break
        means = {name: float(sum(one[name] for one in figures) / len(figures)) for name in figures[0]}
        explained = float(explained_variance(rollout.values, returns, rollout.valid))
        return {**means, "train/explained_variance": explained, "learning_rate": rate, "updates": len(figures)}

    def _loss(self, batch: Minibatch, clip: float) -> tuple[Tensor, Record]:
        """Clipped surrogate, value loss and entropy bonus of one minibatch."""
        config, distribution = self.config, self.policy.distribution
        parameters, values = self.policy.actor(batch.observations), self.critic(batch.observations)
        logprobs = distribution.logprobs(parameters, batch.actions)
        ratios = token_ratios(logprobs, batch.logprobs)
        advantages = whiten(batch.advantages) if config.whiten_advantages else batch.advantages
        surrogate = clipped_surrogate(ratios, advantages, clip_low=clip, clip_high=clip).mean()
        if config.value_clip is None:
            value_loss = squared_value_loss(values, batch.returns).mean()
        else:
            value_loss = clipped_value_loss(values, batch.values, batch.returns, clip=config.value_clip).mean()
        entropy = distribution.entropy(parameters).mean()
        loss = surrogate + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
        with torch.no_grad():
            log_ratios = logprobs - batch.logprobs
            figures = {
                "train/policy_loss": surrogate,
                "train/value_loss": value_loss,
                "entropy": entropy,
                "train/approx_kl": (log_ratios.expm1() - log_ratios).mean(),  # k3 of KL(π_old ‖ π)
                "train/clip_fraction": ((ratios - 1).abs() > clip).float().mean(),
            }
        return loss, figures


def flat(rollout: Rollout, advantages: Tensor, returns: Tensor) -> Minibatch:
    """All steps that were actions, [N, ..]."""
    columns = (rollout.observations, rollout.actions, rollout.logprobs, rollout.values, advantages, returns)
    if rollout.valid.all():
        return Minibatch(*(tensor.flatten(0, 1) for tensor in columns))
    return Minibatch(*(tensor[rollout.valid] for tensor in columns))
