"""A2C: advantage actor-critic, the synchronous form of A3C (Mnih et al. 2016, arXiv:1602.01783).

`steps` and `_loss` are the algorithm, in this order; its mathematics is called from `taurl.functional`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from taurl.control.algorithms.a2c_config import A2CConfig
from taurl.control.networks import parameters_and_values
from taurl.control.policies import Policy
from taurl.control.rollouts import Collector, Rollout
from taurl.control.trainer import Trainer
from taurl.control.updates import FlatAdam
from taurl.functional.surrogates import reinforce
from taurl.functional.value_losses import explained_variance, squared_value_loss
from taurl.functional.whitening import whiten
from taurl.runtime.run import Record


class A2C(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "a2c"
    config_class = A2CConfig
    config: A2CConfig
    sees_images = True

    def set_up(self) -> None:
        config = self.config
        self.policy = Policy.create(self.environments, config)
        self.critic = self.policy.new_critic()
        self.optimizer = FlatAdam({"actor": self.policy.actor, "critic": self.critic}, self._loss, config)
        self.collector = Collector(self.environments, self.policy.distribution, self.policy.normalizer)
        self.state = {"optimizer": self.optimizer, "normalizer": self.policy.normalizer}

    def steps(self) -> Iterator[Record]:
        config = self.config
        steps = config.rollout_steps * config.environments
        with self.begin():
            for step, iterations in self.records(steps):
                found: list[dict[str, Tensor]] = []
                norms: list[float] = []
                for iteration in range(1, iterations + 1):
                    rate = self.rate_of(self.run.step + (iteration - 1) * steps + 1, steps)
                    with step.phase("rollout", "acting"):
                        rollout = self.collector.collect(self.policy.actor, self.critic, config.rollout_steps)
                    with step.phase("update", "updating"):
                        norm, figures = self.optimizer.update(rate, rollout)
                        norms.append(norm)
                        found.append(figures)
                means = {name: torch.stack([one[name] for one in found]).nanmean().item() for name in found[0]}
                means |= {"grad_norm": sum(norms) / len(norms), "learning_rate": rate}
                yield self.finish(step, means)

    def _loss(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy gradient, value loss and entropy bonus of a rollout."""
        config, distribution, valid = self.config, self.policy.distribution, rollout.valid
        advantages, returns = rollout.advantages_and_returns(discount=config.discount, trace_decay=config.trace_decay)
        if config.whiten_advantages:
            advantages = whiten(advantages, valid)
        parameters, values = parameters_and_values(self.policy.actor, self.critic, rollout.observations)
        policy_loss = mean(reinforce(distribution.logprobs(parameters, rollout.actions), advantages), valid)
        value_loss = mean(squared_value_loss(values, returns), valid)
        entropy = mean(distribution.entropy(parameters), valid)
        loss = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
        figures = {
            "loss": loss,
            "train/policy_loss": policy_loss,
            "train/value_loss": value_loss,
            "entropy": entropy,
            "train/explained_variance": explained_variance(rollout.values, returns, valid),
        }
        return loss, {name: figure.detach() for name, figure in figures.items()}


def mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of what counts, [T, B] → []; 0 where nothing does."""
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
