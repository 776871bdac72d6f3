"""Networks of the wing: layers of a few dozen units."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from taurl.control.dense import Array, Dense, Pullback
from taurl.control.distributions import ActionDistribution


class Actor(nn.Module):
    """Observations [.., d] → parameters of the action distribution [.., width + free]."""

    def __init__(self, inputs: int, distribution: ActionDistribution, hidden: Sequence[int], activation: str):
        super().__init__()
        # Nearly the same output for every observation at first: no action is preferred by accident.
        self.layers = Dense([inputs, *hidden, distribution.width], activation, last_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(distribution.free)) if distribution.free else None

    def forward(self, observations: Tensor) -> Tensor:
        return self._with_free(self.layers.forward(observations))  # past what a module's call costs

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

    def with_pullback(self, observations: Tensor) -> tuple[Tensor, Pullback]:
        """Parameters [N, width + free], and what sets the weights' gradients from theirs; see `dense`."""
        found, to_layers = self.layers.with_pullback(observations, to_inputs=False)
        log_std = self.log_std
        if log_std is None:
            return found, to_layers

        def pullback(gradient: Tensor) -> Tensor:
            assert log_std.grad is not None
            mean, free = gradient.chunk(2, -1)
            torch.sum(free, 0, out=log_std.grad)
            return to_layers(mean)

        return self._with_free(found), pullback

    def _with_free(self, found: Tensor) -> Tensor:
        return found if self.log_std is None else torch.cat([found, self.log_std.expand_as(found)], -1)


class Critic(nn.Module):
    """Observations [.., d] → values [..]."""

    def __init__(self, inputs: int, hidden: Sequence[int], activation: str):
        super().__init__()
        self.layers = Dense([inputs, *hidden, 1], activation, last_gain=1.0)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers.forward(observations).squeeze(-1)

    def with_pullback(self, observations: Tensor) -> tuple[Tensor, Pullback]:
        """Values [N], and what sets the weights' gradients from theirs; see `dense`."""
        found, to_layers = self.layers.with_pullback(observations, to_inputs=False)
        return found.squeeze(-1), lambda gradient: to_layers(gradient.unsqueeze(-1))
