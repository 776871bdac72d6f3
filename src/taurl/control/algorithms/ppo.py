"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347).

`steps`, `_iterate` and `_loss` are the algorithm, in this order; its mathematics is called from `taurl.functional`.
`_descend` is one update; its gradient, that of `_loss`, is written out.
"""

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.distributions import FORBIDDEN, masked_logits
from taurl.control.networks import BothWithPullback, both_with_pullback
from taurl.control.penalties import KLPenalty
from taurl.control.policies import Policy
from taurl.control.recurrent import RecurrentCollector, RecurrentCritic, RecurrentRollout
from taurl.control.rollouts import Collector, Rollout
from taurl.control.trainer import Trainer
from taurl.control.updates import Figures, FlatAdam
from taurl.functional.aggregation import row_weights, weighted_sum
from taurl.functional.importance import LARGEST_LOG_RATIO, token_ratios
from taurl.functional.kl import k3
from taurl.functional.slopes import clipped_surrogate_slope, clipped_value_slope
from taurl.functional.surrogates import clipped_surrogate, kl_penalized
from taurl.functional.value_losses import clipped_value_loss, explained_variance, squared_value_loss
from taurl.functional.whitening import whiten_rows
from taurl.runtime.run import Record


class Minibatch(NamedTuple):
    """Some steps of a rollout: all that an update needs, [N, ..] each, in any order, or of whole `Sequences`.

    Steps that only reset stay in, with weight 0.

    Attributes:
        weights: float [N], what each step counts in the minibatch's mean.
    """

    observations: Any  # a tensor, or `Sequences`
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    valid: Tensor
    weights: Tensor
    old_parameters: Any  # of the distribution that acted, [N, ..]; None where its divergence has no price
    action_masks: Tensor | None  # bool [N, n]


class Clips(NamedTuple):
    """How far an update may go, as the schedule has it by now: ε of the ratio, and of the value (None: no bound)."""

    ratio: float
    value: float | None


class PPO(Trainer):
    __doc__ = Trainer.__doc__
    algorithm = "ppo"
    config_class = PPOConfig
    config: PPOConfig
    sees_images = True

    def set_up(self) -> None:
        config, memory = self.config, self.config.memory
        self.policy = policy = Policy.create(self.environments, config, memory=memory, mask_actions=config.mask_actions)
        if memory:
            self.critic: Any = RecurrentCritic(policy.width, config.hidden, memory, config.activation)
        else:
            self.critic = policy.new_critic()
        self.optimizer = FlatAdam({"actor": policy.actor, "critic": self.critic}, None, config)
        self.state = {"optimizer": self.optimizer, "normalizer": policy.normalizer}
        self.collector = Collector(self.environments, policy.distribution, policy.normalizer)
        if memory:
            self.collector = self.state["memory"] = RecurrentCollector(
                self.environments, policy.distribution, policy.normalizer, memory
            )
        self.penalty: KLPenalty | None = None
        if config.kl_penalty_target is not None:
            self.penalty = self.state["penalty"] = KLPenalty(config.kl_coefficient, config.kl_penalty_target)
            if config.clip != PPOConfig.model_fields["clip"].default:
                self._say_unread(f"clip {config.clip:g} does nothing")
            if config.anneal_clip:
                left = "does nothing" if config.value_clip is None else "is for value_clip alone"
                self._say_unread(f"anneal_clip {left}")

    def _say_unread(self, what: str) -> None:
        self.run.view.note(f"kl_penalty_target takes the place of the clip, so {what}")

    def steps(self) -> Iterator[Record]:
        config = self.config
        steps = config.rollout_steps * config.environments
        with self.begin():
            for step, iterations in self.records(steps):
                for iteration in range(1, iterations + 1):
                    with step.phase("rollout", "acting"):
                        rollout = self.collector.collect(self.policy.actor, self.critic, config.rollout_steps)
                    with step.phase("update", "updating"):
                        first = self.run.step + (iteration - 1) * steps + 1
                        figures = self._iterate(rollout, first, measured=iteration == iterations)
                yield self.finish(step, figures)

    def _iterate(self, rollout: Rollout, first: int, *, measured: bool = True) -> Record:
        """Advantages, then epochs of minibatches. Returns the last epoch's figures, if they are measured.

        Args:
            first: the rollout's first step, whose bounds and learning rate it has.
        """
        config = self.config
        advantages, returns = rollout.advantages_and_returns(discount=config.discount, trace_decay=config.trace_decay)
        batch = flat(rollout, advantages, returns, priced=self.penalty is not None)
        rate, clips = self.rate_of(first, rollout.valid.numel()), self._clips(first)
        norms: list[float] = []
        networks = both_with_pullback(self.policy.actor, self.critic)
        whole = self._prepared([batch]) if len(batch.actions) <= config.minibatch_size else None
        drawn = sequences if config.memory else minibatches
        for epoch in range(1, config.epochs + 1):
            figures: list[Figures] = []
            seen = config.target_kl is not None or (measured and epoch == config.epochs)
            for minibatch in whole or self._prepared(list(drawn(batch, config.minibatch_size))):
                norm, found = self._descend(networks, minibatch, rate, clips, measured=seen)
                norms.append(norm)
                figures.append(found)
            if config.target_kl is not None and figures[-1]["train/approx_kl"] > 1.5 * config.target_kl:
                break
        price = self._adapt(self.penalty, batch) if self.penalty else {}
        if not measured:
            return {}
        means = {name: torch.stack([one[name] for one in figures]).mean().item() for name in figures[0]}
        explained = float(explained_variance(rollout.values, returns, rollout.valid))
        return {
            **means,
            **price,
            "grad_norm": sum(norms) / len(norms),
            "train/explained_variance": explained,
            "learning_rate": rate,
        }

    def _clips(self, step: int) -> Clips:
        """Both bounds, falling together as in the reference code; none of the ratio where the KL has a price."""
        config = self.config
        share = 1 - (step - 1) / config.steps if config.anneal_clip else 1.0
        value = None if config.value_clip is None else config.value_clip * share
        return Clips(math.inf if self.penalty else config.clip * share, value)

    @torch.no_grad()
    @np.errstate(over="ignore", invalid="ignore")  # a gradient that is not finite takes no step
    def _descend(
        self, networks: BothWithPullback, batch: Minibatch, rate: float, clips: Clips, *, measured: bool
    ) -> tuple[float, Figures]:
        """One update. Returns the gradient's norm and, if they are measured, the figures before it."""
        parameters, values = self._set_gradient(networks, batch, clips)
        figures = self._loss(parameters, values, batch, clips)[1] if measured else {}
        return self.optimizer.step(rate), figures

    def _set_gradient(self, networks: BothWithPullback, batch: Minibatch, clips: Clips) -> tuple[Tensor, Tensor]:
        """Set the gradient of `_loss`, written out. Returns what the networks give for the minibatch.

        (Beyond e^60, where `token_ratios` stops, the slope goes on: not finite then, and no step is taken.)
        """
        config, distribution, seen = self.config, self.policy.distribution, batch.observations
        weights, returns = batch.weights.numpy(), batch.returns.numpy()
        parameters, values, to_weights = networks(seen.numpy() if isinstance(seen, Tensor) else seen)
        if batch.action_masks is not None:  # what is forbidden gets a slope of 0
            parameters = np.where(batch.action_masks.numpy(), parameters, parameters.dtype.type(FORBIDDEN))
        logprobs, to_parameters = distribution.with_pullback(parameters, batch.actions.numpy())
        ratios = np.exp(np.minimum(logprobs - batch.logprobs.numpy(), LARGEST_LOG_RATIO))
        slopes = clipped_surrogate_slope(ratios, batch.advantages.numpy(), clip_low=clips.ratio, clip_high=clips.ratio)
        entropy_slopes = weights * -config.entropy_coefficient if config.entropy_coefficient else None
        gradient = to_parameters(slopes * weights, entropy_slopes)
        if self.penalty:
            gradient += self.penalty.gradient(distribution, batch.old_parameters, parameters, batch.weights)
        if clips.value is None:
            value_slopes = values - returns
        else:
            value_slopes = clipped_value_slope(values, batch.values.numpy(), returns, clip=clips.value)
        to_weights(gradient, value_slopes * weights * config.value_coefficient)
        return torch.from_numpy(parameters), torch.from_numpy(values)

    @torch.no_grad()
    def _adapt(self, penalty: KLPenalty, batch: Minibatch) -> Record:
        """Adapt the price to how far the policy has moved, over all of the iteration's steps."""
        parameters = masked_logits(self.policy.actor(batch.observations), batch.action_masks)
        divergences = self.policy.distribution.kl(batch.old_parameters, parameters)
        divergence, price = float(weighted_sum(divergences, row_weights(batch.valid))), penalty.coefficient
        penalty.adapt(divergence)
        return {"train/kl": divergence, "train/kl_coefficient": price}

    def _prepared(self, batches: list[Minibatch]) -> list[Minibatch]:
        """Each step's weight, and advantages whitened by its minibatch's own mean and deviation."""
        batches = [batch._replace(weights=row_weights(batch.valid)) for batch in batches]
        if not self.config.whiten_advantages:
            return batches
        valid = pad_sequence([batch.valid for batch in batches], batch_first=True)
        advantages = pad_sequence([batch.advantages for batch in batches], batch_first=True)
        rows = zip(batches, whiten_rows(advantages, valid), strict=True)  # of all at once: operators cost by number
        return [batch._replace(advantages=own[: len(batch.valid)]) for batch, own in rows]

    def _loss(self, parameters: Tensor, values: Tensor, batch: Minibatch, clips: Clips) -> tuple[Tensor, Figures]:
        """Clipped surrogate, value loss and entropy bonus of one minibatch, from what the networks gave for it."""
        config, distribution = self.config, self.policy.distribution
        logprobs = distribution.logprobs(parameters, batch.actions)
        ratios = token_ratios(logprobs, batch.logprobs)
        weights = batch.weights
        if self.penalty:
            divergences = distribution.kl(batch.old_parameters, parameters)
            price = self.penalty.coefficient
            surrogates = kl_penalized(ratios, batch.advantages, divergences, kl_coefficient=price)
        else:
            surrogates = clipped_surrogate(ratios, batch.advantages, clip_low=clips.ratio, clip_high=clips.ratio)
        if clips.value is None:
            value_losses = squared_value_loss(values, batch.returns)
        else:
            value_losses = clipped_value_loss(values, batch.values, batch.returns, clip=clips.value)
        surrogate, value_loss, entropy = (
            weighted_sum(each, weights) for each in (surrogates, value_losses, distribution.entropy(parameters))
        )
        loss = surrogate + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
        with torch.no_grad():
            figures = {
                "loss": loss.detach(),
                "train/policy_loss": surrogate.detach(),
                "train/value_loss": value_loss.detach(),
                "entropy": entropy.detach(),
                "train/approx_kl": weighted_sum(k3(batch.logprobs, logprobs), weights),  # of KL(π_old ‖ π)
            }
            if not self.penalty:
                figures["train/clip_fraction"] = weighted_sum(((ratios - 1).abs() > clips.ratio).float(), weights)
        return loss, figures


def minibatches(batch: Minibatch, size: int) -> Iterator[Minibatch]:
    """The steps in an order drawn anew, `size` at a time."""
    order = torch.randperm(len(batch.actions))
    shuffled = (repeat(None) if column is None else torch.split(column[order], size) for column in batch)
    return (Minibatch(*columns) for columns in zip(*shuffled, strict=False))


def sequences(batch: Minibatch, size: int) -> Iterator[Minibatch]:
    """Whole rollouts of some environments, in an order drawn anew, `size` steps at a time."""
    steps, count = batch.observations.starts.shape
    for environments in torch.split(torch.randperm(count), size // steps):
        rows = (torch.arange(steps)[:, None] * count + environments).flatten()
        others: Any = (None if column is None else column[rows] for column in batch[1:])
        yield Minibatch(batch.observations.of(environments), *others)


def flat(rollout: Rollout, advantages: Tensor, returns: Tensor, *, priced: bool = False) -> Minibatch:
    """All steps, [N, ..]. The weights of those that only reset are 0, and their figures finite."""
    weights = row_weights(rollout.valid.flatten())
    columns: list[Any] = [
        rollout.observations,
        rollout.actions,
        rollout.logprobs,
        rollout.values,
        advantages,
        returns,
        rollout.valid,
        weights.view_as(advantages),
        rollout.parameters if priced else None,
        rollout.action_masks,
    ]
    flattened: list[Any] = [None if column is None else column.flatten(0, 1) for column in columns]
    batch = Minibatch(*flattened)
    return batch._replace(observations=rollout.sequences()) if isinstance(rollout, RecurrentRollout) else batch
