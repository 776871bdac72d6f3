"""Networks of the wing: layers of a few dozen units."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from taurl.control.dense import Array, Dense, Pullback, WithPullback
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

    def with_pullback(self, *, to_inputs: bool = False) -> WithPullback:
        """Observations [N, d] → parameters [N, width + free] and their pullback; see `dense`."""
        layers = self.layers.with_pullback(to_inputs=to_inputs)
        if self.log_std is None:
            return layers
        log_std, of_log_std = self.log_std.detach().numpy(), self.log_std.grad.numpy()  # type: ignore[union-attr]

        def run(observations: Array) -> tuple[Array, Pullback]:
            found, to_layers = layers(observations)

            def pullback(gradient: Array) -> Array:
                mean, free = np.split(gradient, 2, -1)
                free.sum(0, out=of_log_std)
                return to_layers(mean)

            return np.concatenate([found, np.broadcast_to(log_std, found.shape)], -1), pullback

        return run


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

    def with_pullback(self, *, to_inputs: bool = False) -> WithPullback:
        """Observations [N, d] → values [N] and their pullback; see `dense`."""
        layers = self.layers.with_pullback(to_inputs=to_inputs)

        def run(observations: Array) -> tuple[Array, Pullback]:
            found, to_layers = layers(observations)
            return found[:, 0], lambda gradient: to_layers(gradient[:, None])

        return run


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


BothWithPullback = Callable[[Any], tuple[Array, Array, Callable[[Array, Array], None]]]
"""From observations to `parameters_and_values` [N, ..], and what sets the gradients of all weights from theirs."""


def both_with_pullback(actor: Any, critic: Any) -> BothWithPullback:
    """An actor and a critic, differentiable together; see `dense`."""
    if isinstance(actor, Seeing):
        return _both_of(actor.features.with_pullback(), actor.head, critic.head)
    act, judge = actor.with_pullback(), critic.with_pullback()

    def run(observations: Any) -> tuple[Array, Array, Callable[[Array, Array], None]]:
        (parameters, to_actor), (values, to_critic) = act(observations), judge(observations)

        def pullback(slopes: Array, value_slopes: Array) -> None:
            to_actor(slopes)
            to_critic(value_slopes)

        return parameters, values, pullback

    return run


def _both_of(see: WithPullback, actor: Any, critic: Any) -> BothWithPullback:
    """The same of features that both have in common."""
    act, judge = actor.with_pullback(to_inputs=True), critic.with_pullback(to_inputs=True)

    def run(observations: Array) -> tuple[Array, Array, Callable[[Array, Array], None]]:
        features, to_features = see(observations)
        (parameters, to_actor), (values, to_critic) = act(features), judge(features)

        def pullback(slopes: Array, value_slopes: Array) -> None:
            to_features(to_actor(slopes) + to_critic(value_slopes))

        return parameters, values, pullback

    return run
