"""TRPO: trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477).

`steps`, `_iterate`, `_improve` and `_fit` are the algorithm, in this order; its mathematics is called from
`taurl.functional`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from taurl.control.algorithms.trpo_config import TRPOConfig
from taurl.control.networks import Critic
from taurl.control.policies import Policy
from taurl.control.rollouts import Collector, Rollout
from taurl.control.trainer import Trainer
from taurl.control.updates import FlatAdam, require_fit
from taurl.functional.fisher import output_fisher_vector_product
from taurl.functional.importance import token_ratios
from taurl.functional.slopes import huber_value_slope
from taurl.functional.surrogates import importance_weighted
from taurl.functional.trust_region import backtracking_line_search, conjugate_gradient, maximum_step
from taurl.functional.value_losses import explained_variance, squared_value_loss
from taurl.functional.whitening import whiten
from taurl.runtime.run import Record


class Batch(NamedTuple):
    """The steps of a rollout that were actions, [N, ..] each."""

    observations: Tensor
    actions: Tensor
    advantages: Tensor
    returns: Tensor


class Weights:
    """A network's weights, for the checkpoint. (Those that Adam trains are with its state already.)"""

    def __init__(self, module: nn.Module):
        self.module, self.changes = module, 0

    def tensors(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        require_fit(tensors, self.tensors())
        self.module.load_state_dict(tensors)


class TRPO(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "trpo"
    config_class = TRPOConfig
    config: TRPOConfig

    def set_up(self) -> None:
        config = self.config
        self.policy = Policy.create(self.environments, config)
        self.weights = Weights(self.policy.actor)
        self.critic = Critic(self.policy.width, config.hidden, config.activation)
        self.optimizer = FlatAdam({"critic": self.critic}, None, config)
        self.collector = Collector(self.environments, self.policy.distribution, self.policy.normalizer)
        self.state = {"actor": self.weights, "critic": self.optimizer, "normalizer": self.policy.normalizer}

    def steps(self) -> Iterator[Record]:
        config = self.config
        steps = config.rollout_steps * config.environments
        with self.begin():
            for step, iterations in self.records(steps):
                for iteration in range(1, iterations + 1):
                    with step.phase("rollout", "acting"):
                        rollout = self.collector.collect(self.policy.actor, self.critic, config.rollout_steps)
                    with step.phase("update", "updating"):
                        figures = self._iterate(rollout, self.run.step + (iteration - 1) * steps + 1)
                yield self.finish(step, figures)

    def _iterate(self, rollout: Rollout, first: int) -> Record:
        """Advantages, one step of the policy, then epochs of the critic."""
        config = self.config
        advantages, returns = rollout.advantages_and_returns(discount=config.discount, trace_decay=config.trace_decay)
        columns = (rollout.observations, rollout.actions, advantages, returns)
        batch = Batch(*(column[rollout.valid] for column in columns))
        explained = float(explained_variance(rollout.values, returns, rollout.valid))
        improved = self._improve(batch)
        fitted = self._fit(batch, self.rate_of(first, rollout.valid.numel()))
        return improved | fitted | {"train/explained_variance": explained}

    def _improve(self, batch: Batch) -> Record:
        """Move the policy along the natural gradient, at most `max_kl` away."""
        config, actor, distribution = self.config, self.policy.actor, self.policy.distribution
        weights = list(actor.parameters())
        # One batch, one mean: the advantages' scale does not matter to the step, and a shift only adds variance.
        advantages = whiten(batch.advantages)
        outputs = actor(batch.observations)
        old = outputs.detach()
        old_logprobs = distribution.logprobs(old, batch.actions)

        def surrogate(parameters: Tensor) -> Tensor:
            ratios = token_ratios(distribution.logprobs(parameters, batch.actions), old_logprobs)
            return importance_weighted(ratios, advantages).mean()

        def kl(parameters: Tensor) -> Tensor:
            return torch.mean(distribution.kl(old, parameters))

        gradient = torch.autograd.grad(surrogate(outputs), weights, retain_graph=True)
        fisher = output_fisher_vector_product(outputs, kl, weights)

        def curvature(vector: Tensor) -> Tensor:
            return fisher(vector) + config.damping * vector

        solution = conjugate_gradient(
            curvature, -parameters_to_vector(gradient), iterations=config.conjugate_gradient_steps
        )
        found = backtracking_line_search(
            lambda: surrogate(actor(batch.observations)),
            lambda: kl(actor(batch.observations)),
            weights,
            maximum_step(curvature, solution.vector, max_kl=config.max_kl),
            max_kl=config.max_kl,
        )
        self.weights.changes += 1
        return {
            "train/kl": found.kl,
            "train/surrogate_improvement": found.improvement,
            "train/step_accepted": float(found.accepted),
            "train/step_fraction": found.fraction,
            "train/residual": solution.residual,
            "entropy": float(distribution.entropy(old).mean()),
        }

    @torch.no_grad()
    @np.errstate(over="ignore", invalid="ignore")  # a gradient that is not finite takes no step
    def _fit(self, batch: Batch, rate: float) -> Record:
        """Epochs of the critic, towards the returns, down the squared error."""
        config, judge = self.config, self.critic.with_pullback()
        for _ in range(config.critic_epochs):
            order = torch.randperm(len(batch.returns))
            shuffled = (
                torch.split(column[order], config.minibatch_size) for column in (batch.observations, batch.returns)
            )
            for observations, returns in zip(*shuffled, strict=True):
                values, pullback = judge(observations.numpy())
                slopes = huber_value_slope(values, returns.numpy(), threshold=math.inf)
                pullback(slopes / len(returns))
                self.optimizer.step(rate)
        loss = squared_value_loss(self.critic(batch.observations), batch.returns).mean()
        return {"train/value_loss": float(loss), "learning_rate": rate}
