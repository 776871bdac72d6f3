"""Networks of the wing: layers of a few dozen units."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from taurl.control.dense import Array, Dense, Pullback
from taurl.control.distributions import ActionDistribution
from taurl.control.images import Features
from taurl.control.spaces import has_images, width


class Actor(nn.Module):
    """Observations [.., d] → parameters of the action distribution [.., width + free]."""

    def __init__(self, inputs: int, distribution: ActionDistribution, hidden: Sequence[int], activation: str):
        super().__init__()
        # Nearly the same output for every observation at first: no action is preferred by accident.
        self.layers = Dense([inputs, *hidden, distribution.width], activation, last_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(distribution.free)) if distribution.free else None

    def forward(self, observations: Tensor) -> Tensor:
        return with_free(self.layers.forward(observations), self.log_std)  # past what a module's call costs

    def of_arrays(self) -> Callable[[Array], Array]:
        """The same as a function of arrays; see `dense`."""
        act = self.layers.of_arrays()
        if self.log_std is None:
            return act
        log_std = self.log_std.detach().numpy()

        def act_with_free(observations: Array) -> Array:
            found = act(observations)
            return np.concatenate([found, np.broadcast_to(log_std, found.shape)], -1)

        return act_with_free

    def with_pullback(self, observations: Tensor, *, to_inputs: bool = False) -> tuple[Tensor, Pullback]:
        """Parameters [N, width + free], and what sets the weights' gradients from theirs; see `dense`."""
        found, to_layers = self.layers.with_pullback(observations, to_inputs=to_inputs)
        log_std = self.log_std
        if log_std is None:
            return found, to_layers

        def pullback(gradient: Tensor) -> Tensor:
            assert log_std.grad is not None
            mean, free = gradient.chunk(2, -1)
            torch.sum(free, 0, out=log_std.grad)
            return to_layers(mean)

        return with_free(found, log_std), pullback


def with_free(found: Tensor, free: Tensor | None) -> Tensor:
    """What a network gives [.., width], and beside it the parameters that do not depend on the state."""
    return found if free is None else torch.cat([found, free.expand_as(found)], -1)


class Critic(nn.Module):
    """Observations [.., d] → values [..]."""

    def __init__(self, inputs: int, hidden: Sequence[int], activation: str):
        super().__init__()
        self.layers = Dense([inputs, *hidden, 1], activation, last_gain=1.0)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers.forward(observations).squeeze(-1)

    def with_pullback(self, observations: Tensor, *, to_inputs: bool = False) -> tuple[Tensor, Pullback]:
        """Values [N], and what sets the weights' gradients from theirs; see `dense`."""
        found, to_layers = self.layers.with_pullback(observations, to_inputs=to_inputs)
        return found.squeeze(-1), lambda gradient: to_layers(gradient.unsqueeze(-1))


class Seeing(nn.Module):
    """An actor or a critic of the features of observations that have images in them, uint8 [.., d].

    Args:
        features: what it sees; common to actor and critic.
        head: of the features.
    """

    def __init__(self, features: Features, head: Actor | Critic):
        super().__init__()
        self.features, self.head = features, head

    def forward(self, observations: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(observations))
        return found


def actor_for(
    space: gymnasium.Space[Any], distribution: ActionDistribution, hidden: Sequence[int], activation: str
) -> Actor | Seeing:
    """A new actor for observations of this space."""
    if not has_images(space):
        return Actor(width(space), distribution, hidden, activation)
    features = Features(space)
    return Seeing(features, Actor(features.width, distribution, features.hidden(hidden), activation))


def critic_for(
    space: gymnasium.Space[Any], actor: Actor | Seeing, hidden: Sequence[int], activation: str
) -> Critic | Seeing:
    """A new critic beside an actor, with layers of its own; what they see of images is common to both."""
    if not isinstance(actor, Seeing):
        return Critic(width(space), hidden, activation)
    features = actor.features
    return Seeing(features, Critic(features.width, features.hidden(hidden), activation))


def parameters_and_values(actor: Any, critic: Any, observations: Tensor) -> tuple[Tensor, Tensor]:
    """What both give for the same observations; what they see in common is computed once."""
    if not isinstance(actor, Seeing):
        return actor(observations), critic(observations)
    features = actor.features(observations)
    return actor.head(features), critic.head(features)


def both_with_pullback(
    actor: Any, critic: Any, observations: Any
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], None]]:
    """`parameters_and_values` [N, ..], and what sets the gradients of all weights from theirs; see `dense`."""
    if isinstance(actor, Seeing):
        features, to_features = actor.features.with_pullback(observations)
        parameters, to_actor = actor.head.with_pullback(features, to_inputs=True)
        values, to_critic = critic.head.with_pullback(features, to_inputs=True)
    else:
        parameters, to_actor = actor.with_pullback(observations)
        values, to_critic = critic.with_pullback(observations)

    def pullback(slopes: Tensor, value_slopes: Tensor) -> None:
        of_actor, of_critic = to_actor(slopes), to_critic(value_slopes)
        if isinstance(actor, Seeing):
            to_features(of_actor + of_critic)

    return parameters, values, pullback
