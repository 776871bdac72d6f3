"""Action distributions of a policy network: what its outputs mean, by action space.

`parameters` is what the network gives for a batch, [.., width + free]; an action is [..] or [.., K]. Functions only, so
that every algorithm reads the same: act, score, compare. What acts (`drawn`, `mode`, `to_environment`) and what is
differentiated by hand (`with_pullback`) takes arrays of numpy, which for a handful of numbers is several times faster;
what automatic differentiation goes through takes tensors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from taurl.functional.kl import categorical_kl, diagonal_gaussian_kl
from taurl.runtime.errors import InputError

Array = np.ndarray[Any, Any]
FORBIDDEN = -1e8  # the logit of an action that a mask forbids

LogprobPullback = Callable[..., Array]
"""From slopes [N] in log π, and None or slopes [N] in the entropy, to those in the parameters [N, width + free]."""


class ActionDistribution(ABC):
    """How `width` numbers of a network, and `free` parameters that do not depend on the state, make a policy."""

    width: int
    free: int = 0

    @abstractmethod
    def noise(self, *shape: int) -> Array:
        """What makes draws of as many actions random, [*shape, width], from torch's global generator."""

    @abstractmethod
    def drawn(self, parameters: Array, noise: Array) -> Array:
        """The action of each row that this noise picks."""

    def sample(self, parameters: Array) -> Array:
        """Draw an action for each row, from torch's global generator."""
        return self.drawn(parameters, self.noise(*parameters.shape[:-1]))

    @abstractmethod
    def mode(self, parameters: Array) -> Array:
        """The most likely action of each row."""

    @abstractmethod
    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s) of each row, [..]."""

    def with_pullback(self, parameters: Array, actions: Array) -> tuple[Array, LogprobPullback]:
        """log π(a|s) [N], and what takes a loss's slopes in it and in the entropy back to the parameters [N, ..].

        Here by automatic differentiation; written out where much depends on it.
        """
        with torch.enable_grad():
            leaf = torch.from_numpy(parameters).clone().requires_grad_()
            logprobs, entropy = self.logprobs(leaf, torch.from_numpy(actions)), self.entropy(leaf)

        def pullback(slopes: Array, entropy_slopes: Array | None = None) -> Array:
            pairs = [(logprobs, slopes)] + ([] if entropy_slopes is None else [(entropy, entropy_slopes)])
            outputs, gradients = zip(*pairs, strict=True)
            found: Array = torch.autograd.grad(outputs, leaf, list(map(torch.from_numpy, gradients)))[0].numpy()
            return found

        return logprobs.detach().numpy(), pullback

    @abstractmethod
    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy of each row in nats, [..]."""

    @abstractmethod
    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """KL(π(parameters) ‖ π(other)) of each row, [..]."""

    def to_environment(self, actions: Array) -> Array:
        """Actions as the environment takes them."""
        return actions


class Categorical(ActionDistribution):
    """One choice among n: parameters are logits."""

    def __init__(self, choices: int, start: int = 0):
        self.width, self.start = choices, start

    def noise(self, *shape: int) -> Array:
        # Gumbel's trick: the argmax of logits plus such noise is a draw from their softmax.
        return torch.empty(*shape, self.width).exponential_().log_().neg_().numpy()

    def drawn(self, parameters: Array, noise: Array) -> Array:
        return self.mode(parameters + noise)

    def mode(self, parameters: Array) -> Array:
        chosen: Array = parameters.argmax(-1)
        return chosen

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        return parameters.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def with_pullback(self, parameters: Array, actions: Array) -> tuple[Array, LogprobPullback]:
        logprobs = parameters - parameters.max(-1, keepdims=True)
        probabilities = np.exp(logprobs)
        totals = probabilities.sum(-1, keepdims=True)
        probabilities /= totals
        logprobs -= np.log(totals)
        rows = np.arange(len(actions))

        def pullback(slopes: Array, entropy_slopes: Array | None = None) -> Array:
            gradient: Array = probabilities * -slopes[:, None]
            gradient[rows, actions] += slopes  # ∂ log π_a / ∂z = 1_a − π
            if entropy_slopes is not None:  # ∂H / ∂z = −π (log π + H)
                surprise = logprobs - (probabilities * logprobs).sum(-1, keepdims=True)
                gradient -= probabilities * surprise * entropy_slopes[:, None]
            return gradient

        return logprobs[rows, actions], pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        logprobs = parameters.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        return categorical_kl(parameters, other)

    def to_environment(self, actions: Array) -> Array:
        return actions + self.start


class MultiCategorical(ActionDistribution):
    """K independent choices among n_1 … n_K: parameters are their logits side by side, actions [.., K].

    Args:
        start: the first value of each choice for the environment, [*shape].
    """

    def __init__(self, choices: list[int], shape: tuple[int, ...], start: Array | int = 0):
        self.choices, self.width, self.shape, self.start = choices, sum(choices), shape, start

    def _parts(self, parameters: Tensor) -> list[tuple[Categorical, Tensor]]:
        return [(Categorical(part.shape[-1]), part) for part in torch.split(parameters, self.choices, -1)]

    def noise(self, *shape: int) -> Array:
        return np.concatenate([Categorical(n).noise(*shape) for n in self.choices], -1)

    def drawn(self, parameters: Array, noise: Array) -> Array:
        return self.mode(parameters + noise)

    def mode(self, parameters: Array) -> Array:
        parts = np.split(parameters, np.cumsum(self.choices)[:-1], -1)
        return np.stack([part.argmax(-1) for part in parts], -1)

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        found = [one.logprobs(part, actions[..., k]) for k, (one, part) in enumerate(self._parts(parameters))]
        return torch.stack(found, -1).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        return torch.stack([one.entropy(part) for one, part in self._parts(parameters)], -1).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        pairs = zip(self._parts(parameters), torch.split(other, self.choices, -1), strict=True)
        return torch.stack([one.kl(mine, theirs) for (one, mine), theirs in pairs], -1).sum(-1)

    def to_environment(self, actions: Array) -> Array:
        return actions.reshape(*actions.shape[:-1], *self.shape) + self.start


class Bernoulli(ActionDistribution):
    """K independent switches: parameters are the logits of 1, actions [.., K] of 0 and 1."""

    def __init__(self, switches: int, shape: tuple[int, ...]):
        self.width, self.shape = switches, shape

    def noise(self, *shape: int) -> Array:
        return torch.rand(*shape, self.width).logit_().numpy()

    def drawn(self, parameters: Array, noise: Array) -> Array:
        return (noise < parameters).astype(np.int64)

    def mode(self, parameters: Array) -> Array:
        return (parameters > 0).astype(np.int64)

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        return -torch.nn.functional.softplus(torch.where(actions > 0, -parameters, parameters)).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        softplus = torch.nn.functional.softplus
        return (softplus(parameters) - parameters * parameters.sigmoid()).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        nothing = torch.zeros_like(parameters)
        mine, theirs = torch.stack([nothing, parameters], -1), torch.stack([nothing, other], -1)
        return categorical_kl(mine, theirs).sum(-1)

    def to_environment(self, actions: Array) -> Array:
        return actions.astype(np.int8).reshape(*actions.shape[:-1], *self.shape)


class Gaussian(ActionDistribution):
    """A diagonal Gaussian: the network gives the means, the logarithms of the deviations are free parameters.

    `parameters` are means and log-deviations side by side, [.., 2d]. Samples may lie outside the box; the environment
    gets them clipped, and they are scored as they were drawn. One of whole numbers gets them rounded.

    Args:
        whole: the box, if it is of whole numbers.
    """

    def __init__(self, dimensions: int, shape: tuple[int, ...], whole: spaces.Box | None = None):
        self.width = self.free = dimensions
        self.shape, self.whole = shape, whole

    def noise(self, *shape: int) -> Array:
        return torch.randn(*shape, self.width).numpy()

    def drawn(self, parameters: Array, noise: Array) -> Array:
        mean, log_std = np.split(parameters, 2, -1)
        return np.asarray(mean + np.exp(log_std) * noise)

    def mode(self, parameters: Array) -> Array:
        return np.split(parameters, 2, -1)[0]

    def logprobs(self, parameters: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = parameters.chunk(2, -1)
        standard = (actions - mean) * (-log_std).exp()
        return -(0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def with_pullback(self, parameters: Array, actions: Array) -> tuple[Array, LogprobPullback]:
        mean, log_std = np.split(parameters, 2, -1)
        inverse = np.exp(-log_std)
        standard = (actions - mean) * inverse

        def pullback(slopes: Array, entropy_slopes: Array | None = None) -> Array:
            own = slopes[:, None]
            to_mean, to_log_std = standard * inverse * own, (standard * standard - 1) * own
            if entropy_slopes is not None:
                to_log_std += entropy_slopes[:, None]
            return np.concatenate([to_mean, to_log_std], -1)

        logprobs: Array = -(0.5 * standard * standard + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
        return logprobs, pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        return (parameters.chunk(2, -1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        return diagonal_gaussian_kl(*parameters.chunk(2, -1), *other.chunk(2, -1))

    def to_environment(self, actions: Array) -> Array:
        actions = actions.reshape(*actions.shape[:-1], *self.shape)
        if self.whole is None:
            return actions
        return np.clip(np.rint(actions), self.whole.low, self.whole.high).astype(self.whole.dtype)


def masked_logits(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits of which those of forbidden actions are so low that their probability is exactly 0.

    A large finite number, as in the paper, and not −∞: entropy and divergences stay free of 0 · ∞. The gradient of a
    forbidden action's logit is exactly 0.

    Args:
        logits: float [.., n], of a categorical, or of several side by side.
        allowed: bool [.., n], with an action for each; None for all.
    Source: Huang and Ontañón 2022, arXiv:2006.14171, section 3.
    """
    return logits if allowed is None else torch.where(allowed, logits, FORBIDDEN)


def distribution_for(space: gymnasium.Space[Any]) -> ActionDistribution:
    """The distribution over an action space. Raises: InputError for a space that has none here."""
    match space:
        case spaces.Discrete():
            return Categorical(int(space.n), int(space.start))
        case spaces.MultiDiscrete():
            return MultiCategorical([int(n) for n in space.nvec.reshape(-1)], space.shape, space.start)
        case spaces.MultiBinary():
            return Bernoulli(math.prod(space.shape), space.shape)
        case spaces.Box():
            whole = space if np.issubdtype(space.dtype, np.integer) else None
            return Gaussian(math.prod(space.shape), space.shape, whole)
    raise InputError(
        f"action space {space} is not one of Discrete, MultiDiscrete, MultiBinary and Box; wrap the environment "
        "(gymnasium.ActionWrapper) so that it takes one of these"
    )
