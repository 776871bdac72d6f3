"""Rollouts: T steps of B environments, time-major, with what bootstraps and what counts made explicit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taurl.control.dense import of_arrays
from taurl.control.distributions import FORBIDDEN, ActionDistribution, Array, masked_logits
from taurl.control.environments import Environments, SingleEpisodes, Transition, batched
from taurl.control.normalization import Normalizer
from taurl.control.spaces import encode
from taurl.functional.returns import generalized_advantage

Network = Callable[[Tensor], Tensor]
NOISE_STEPS = 32  # whose actions' noise is drawn at once


@dataclass
class Rollout:
    """T steps of B environments.

    Attributes:
        observations: float [T, B, d], what was acted on, encoded and normalised.
        actions: [T, B] or [T, B, K].
        logprobs: float [T, B], under the policy that acted.
        parameters: float [T, B, ..], of the distribution that the action was drawn from.
        rewards: float [T, B], normalised where that is asked for.
        terminated, truncated: bool [T, B].
        valid: bool [T, B], False for the steps that only reset.
        values: float [T, B]; zeros without a critic.
        next_values: float [T, B], of the state that followed, before any reset.
        action_masks: bool [T, B, n], what was allowed, where that is asked for; `parameters` are masked then.
    """

    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    parameters: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    values: Tensor
    next_values: Tensor
    action_masks: Tensor | None = None

    def advantages_and_returns(self, *, discount: float, trace_decay: float) -> tuple[Tensor, Tensor]:
        """Advantages by GAE(γ, λ), and the λ-returns that they are of, both float [T, B]."""
        advantages = generalized_advantage(
            self.rewards,
            self.values,
            self.next_values,
            self.terminated,
            self.truncated,
            discount=discount,
            trace_decay=trace_decay,
        )
        return advantages, advantages + self.values


class Collector:
    """Acts in the environments, from where they stand."""

    def __init__(self, environments: Environments, distribution: ActionDistribution, normalizer: Normalizer):
        self.environments, self.distribution, self.normalizer = environments, distribution, normalizer
        self.space = environments.observation_space

    def _current(self) -> Tensor:
        """What to act on next, encoded; counted by the normalizer once, when it is new."""
        encoded = encode(self.space, self.environments.observations)
        if not self.environments.fresh:
            return self.normalizer.apply(encoded)
        self.normalizer.begin_episodes()
        return self.normalizer.observe(encoded)

    def collect(self, actor: Network, critic: Network | None, steps: int) -> Rollout:
        """Act for so many steps in every environment."""
        return self._collect(actor, critic, lambda taken: taken < steps)

    def collect_episodes(
        self,
        actor: Network,
        critic: Network | None,
        *,
        seeds: Sequence[int] | None = None,
        longest: int | None = None,
    ) -> Rollout:
        """Play one whole episode in every environment; T is the longest, what follows a shorter one is not valid.

        Args:
            seeds: of each environment's beginning; None for any.
            longest: episodes that are longer are cut after so many steps, as by a time limit.
        """
        environments = self.environments
        assert isinstance(environments, SingleEpisodes)
        environments.reset(seeds)
        rollout = self._collect(actor, critic, lambda taken: taken != longest and not environments.finished.all())
        rollout.truncated[-1] |= torch.from_numpy(environments.cut())
        return rollout

    @torch.no_grad()  # not inference mode: what it makes is differentiated through later
    def _collect(self, actor: Network, critic: Network | None, goes_on: Callable[[int], bool]) -> Rollout:
        environments, distribution, normalizer = self.environments, self.distribution, self.normalizer
        seen = [self._current()]
        act, drawn = of_arrays(actor), []
        given: list[Transition] = []
        allowed: list[Array] = []
        while goes_on(len(given)):
            place = len(given) % NOISE_STEPS
            if not place:
                noise = distribution.noise(NOISE_STEPS, environments.count)
            outputs = act(seen[-1].numpy())
            if environments.action_masks is not None:
                allowed.append(environments.action_masks)
                outputs = np.where(allowed[-1], outputs, FORBIDDEN)
            drawn.append(distribution.drawn(outputs, noise[place]))
            # What a copy shows while it waits for the longest episode is acted on nowhere.
            playing = ~environments.finished if isinstance(environments, SingleEpisodes) else None
            transition = environments.step(distribution.to_environment(drawn[-1]))
            seen.append(normalizer.observe(encode(self.space, transition.observations), playing))
            given.append(transition)
        observations = torch.stack(seen)
        masks = torch.from_numpy(np.stack(allowed)) if allowed else None
        parameters, actions = masked_logits(actor(observations[:-1]), masks), torch.from_numpy(np.stack(drawn))
        rewards, terminated, truncated, only_reset = (
            torch.from_numpy(np.stack(column)) for column in list(zip(*given, strict=True))[1:5]
        )
        values, next_values = self._values(critic, observations, given)
        return Rollout(
            observations=observations[:-1],
            actions=actions,
            logprobs=distribution.logprobs(parameters, actions),
            parameters=parameters,
            rewards=normalizer.rewards(rewards.float(), terminated | truncated, ~only_reset),
            terminated=terminated,
            truncated=truncated & ~terminated,
            valid=~only_reset,
            values=values,
            next_values=next_values,
            action_masks=masks,
        )

    def _values(self, critic: Network | None, observations: Tensor, given: list[Transition]) -> tuple[Tensor, Tensor]:
        """V of each observation acted on, and of what followed it."""
        if critic is None:
            nothing = torch.zeros(observations.shape[0] - 1, observations.shape[1])
            return nothing, nothing
        values = critic(observations)
        next_values = values[1:].clone()
        steps, copies, ended = self._ended(given)
        if steps:
            next_values[steps, copies] = critic(ended)
        return values[:-1], next_values

    def _ended(self, given: list[Transition]) -> tuple[list[int], list[int], Tensor]:
        """Copies that have reset within the step: when, which, and what followed in place of what is acted on next."""
        last = [(t, copy, seen) for t, one in enumerate(given) for copy, seen in one.last_observations.items()]
        if not last:
            return [], [], torch.empty(0)
        steps, copies, seen = zip(*last, strict=True)
        ended = self.normalizer.apply(torch.cat([encode(self.space, batched(one)) for one in seen]))
        return list(steps), list(copies), ended
