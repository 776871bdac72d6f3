"""Rollouts: T steps of B environments, time-major, with what bootstraps and what counts made explicit."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taurl.control.distributions import ActionDistribution
from taurl.control.environments import Environments, Transition
from taurl.control.normalization import Normalizer
from taurl.control.spaces import encode, width

Network = Callable[[Tensor], Tensor]


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


class Collector:
    """Acts in the environments and keeps where they stand between rollouts."""

    def __init__(self, environments: Environments, distribution: ActionDistribution, normalizer: Normalizer):
        self.environments, self.distribution, self.normalizer = environments, distribution, normalizer
        self.space = environments.observation_space
        self.observations = self._encoded(environments.reset())

    def _encoded(self, batch: object) -> Tensor:
        return self.normalizer.observe(encode(self.space, batch))

    @torch.inference_mode()
    def collect(self, actor: Network, critic: Network | None, steps: int) -> Rollout:
        """Act for so many steps in every environment."""
        environments, distribution = self.environments, self.distribution
        count = environments.count
        observations = torch.empty(steps + 1, count, width(self.space))
        observations[0] = self.observations
        drawn: list[tuple[Tensor, Tensor]] = []
        given: list[Transition] = []
        for t in range(steps):
            parameters = actor(observations[t])
            actions = distribution.sample(parameters)
            transition = environments.step(distribution.to_environment(actions))
            observations[t + 1] = self._encoded(transition.observations)
            drawn.append((parameters, actions))
            given.append(transition)
        self.observations = observations[steps]
        parameters, actions = (torch.stack(column) for column in zip(*drawn, strict=True))
        rewards, terminated, truncated, only_reset = (
            torch.from_numpy(np.stack(column)) for column in list(zip(*given, strict=True))[1:5]
        )
        values, next_values = self._values(critic, observations, given)
        return Rollout(
            observations=observations[:steps],
            actions=actions,
            logprobs=distribution.logprobs(parameters, actions),
            parameters=parameters,
            rewards=self.normalizer.rewards(rewards.float(), terminated | truncated, ~only_reset),
            terminated=terminated,
            truncated=truncated & ~terminated,
            valid=~only_reset,
            values=values,
            next_values=next_values,
        )

    def _values(self, critic: Network | None, observations: Tensor, given: list[Transition]) -> tuple[Tensor, Tensor]:
        """V of each observation acted on, and of what followed it."""
        if critic is None:
            nothing = torch.zeros(observations.shape[0] - 1, observations.shape[1])
            return nothing, nothing
        values = critic(observations)
        next_values = values[1:].clone()
        # Copies that have reset within the step: what followed is not what is acted on next.
        last = [(t, copy, seen) for t, one in enumerate(given) for copy, seen in one.last_observations.items()]
        if last:
            steps, copies, seen = zip(*last, strict=True)
            ended = self.normalizer.apply(torch.cat([encode(self.space, batched(one)) for one in seen]))
            next_values[list(steps), list(copies)] = critic(ended)
        return values[:-1], next_values


def batched(observation: object) -> object:
    """One observation as a batch of one, as its space batches them."""
    if isinstance(observation, dict):
        return {name: batched(part) for name, part in observation.items()}
    if isinstance(observation, tuple):
        return tuple(batched(part) for part in observation)
    return np.asarray(observation)[None]
