"""Action distributions of a policy network: what its outputs mean, by action space.

`parameters` is what the network gives for a batch, [.., width]; an action is [..] or [.., K]. Functions of tensors
only, so that every algorithm reads the same: draw, score, compare.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import torch
from gymnasium import spaces
from torch import Tensor

from taurl.functional.kl import categorical_kl, diagonal_gaussian_kl
from taurl.runtime.errors import InputError


class ActionDistribution(ABC):
    """How `width` numbers of a network, and `free` parameters that do not depend on the state, make a policy."""

    width: int
    free: int = 0

    @abstractmethod
    def sample(self, parameters: Tensor) -> Tensor:
        """Draw an action for each row, from torch's global generator."""

    @abstractmethod
    def mode(self, parameters: Tensor) -> Tensor:
        """The most likely action of each row."""

    @abstractmethod
    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s) of each row, [..]."""

    @abstractmethod
    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy of each row in nats, [..]."""

    @abstractmethod
    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """KL(π(parameters) ‖ π(other)) of each row, [..]."""

    def to_environment(self, actions: Tensor) -> Any:
        """Actions as the environment takes them."""
        return actions.numpy()


class Categorical(ActionDistribution):
    """One choice among n: parameters are logits."""

    def __init__(self, choices: int, start: int = 0):
        self.width, self.start = choices, start

    def sample(self, parameters: Tensor) -> Tensor:
        # Gumbel's trick: the argmax of logits plus such noise is a draw from their softmax.
        noise = torch.empty_like(parameters).exponential_().log_()
        return (parameters - noise).argmax(-1)

    def mode(self, parameters: Tensor) -> Tensor:
        return parameters.argmax(-1)

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        return parameters.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        logprobs = parameters.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        return categorical_kl(parameters, other)

    def to_environment(self, actions: Tensor) -> Any:
        return actions.numpy() + self.start if self.start else actions.numpy()


class MultiCategorical(ActionDistribution):
    """K independent choices among n_1 … n_K: parameters are their logits side by side, actions [.., K]."""

    def __init__(self, choices: list[int], shape: tuple[int, ...]):
        self.choices, self.width, self.shape = choices, sum(choices), shape

    def _parts(self, parameters: Tensor) -> list[tuple[Categorical, Tensor]]:
        return [(Categorical(part.shape[-1]), part) for part in torch.split(parameters, self.choices, -1)]

    def sample(self, parameters: Tensor) -> Tensor:
        return torch.stack([one.sample(part) for one, part in self._parts(parameters)], -1)

    def mode(self, parameters: Tensor) -> Tensor:
        return torch.stack([one.mode(part) for one, part in self._parts(parameters)], -1)

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        found = [one.logprobs(part, actions[..., k]) for k, (one, part) in enumerate(self._parts(parameters))]
        return torch.stack(found, -1).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        return torch.stack([one.entropy(part) for one, part in self._parts(parameters)], -1).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        pairs = zip(self._parts(parameters), torch.split(other, self.choices, -1), strict=True)
        return torch.stack([one.kl(mine, theirs) for (one, mine), theirs in pairs], -1).sum(-1)

    def to_environment(self, actions: Tensor) -> Any:
        return actions.reshape(*actions.shape[:-1], *self.shape).numpy()


class Bernoulli(ActionDistribution):
    """K independent switches: parameters are the logits of 1, actions [.., K] of 0 and 1."""

    def __init__(self, switches: int, shape: tuple[int, ...]):
        self.width, self.shape = switches, shape

    def sample(self, parameters: Tensor) -> Tensor:
        return (torch.rand_like(parameters) < parameters.sigmoid()).long()

    def mode(self, parameters: Tensor) -> Tensor:
        return (parameters > 0).long()

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        return -torch.nn.functional.softplus(torch.where(actions > 0, -parameters, parameters)).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        softplus = torch.nn.functional.softplus
        return (softplus(parameters) - parameters * parameters.sigmoid()).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        nothing = torch.zeros_like(parameters)
        mine, theirs = torch.stack([nothing, parameters], -1), torch.stack([nothing, other], -1)
        return categorical_kl(mine, theirs).sum(-1)

    def to_environment(self, actions: Tensor) -> Any:
        return actions.to(torch.int8).reshape(*actions.shape[:-1], *self.shape).numpy()


class Gaussian(ActionDistribution):
    """A diagonal Gaussian: the network gives the means, the logarithms of the deviations are free parameters.

    `parameters` are means and log-deviations side by side, [.., 2d]. Samples may lie outside the box; the environment
    gets them clipped, and they are scored as they were drawn.
    """

    def __init__(self, dimensions: int, shape: tuple[int, ...]):
        self.width = self.free = dimensions
        self.shape = shape

    def sample(self, parameters: Tensor) -> Tensor:
        mean, log_std = parameters.chunk(2, -1)
        return mean + log_std.exp() * torch.randn_like(mean)

    def mode(self, parameters: Tensor) -> Tensor:
        return parameters.chunk(2, -1)[0]

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = parameters.chunk(2, -1)
        standard = (actions - mean) * (-log_std).exp()
        return -(0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        return (parameters.chunk(2, -1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        return diagonal_gaussian_kl(*parameters.chunk(2, -1), *other.chunk(2, -1))

    def to_environment(self, actions: Tensor) -> Any:
        return actions.reshape(*actions.shape[:-1], *self.shape).numpy()


def distribution_for(space: gymnasium.Space[Any]) -> ActionDistribution:
    """The distribution over an action space. Raises: InputError for a space that has none here."""
    match space:
        case spaces.Discrete():
            return Categorical(int(space.n), int(space.start))
        case spaces.MultiDiscrete() if not space.start.any():
            return MultiCategorical([int(n) for n in space.nvec.reshape(-1)], space.shape)
        case spaces.MultiBinary():
            return Bernoulli(math.prod(space.shape), space.shape)
        case spaces.Box():
            return Gaussian(math.prod(space.shape), space.shape)
    raise InputError(f"action space {space} is not one of Discrete, MultiDiscrete, MultiBinary and Box")
