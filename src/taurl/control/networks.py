"""Networks of the wing: layers of a few dozen units, initialised as PPO's reference code does."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taurl.control.distributions import ActionDistribution

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Layers(nn.Sequential):
    """Linear layers and activations, applied without calling each as a module: that costs as much as their products."""

    def forward(self, inputs: Tensor) -> Tensor:
        for part in self._modules.values():
            if isinstance(part, nn.Linear):
                inputs = nn.functional.linear(inputs, part.weight, part.bias)
            else:
                inputs = inputs.tanh() if isinstance(part, nn.Tanh) else inputs.relu()
        return inputs


def layers(widths: Sequence[int], activation: str, *, last_gain: float) -> Layers:
    """Linear layers with an activation between them, orthogonal weights and biases of 0.

    Args:
        widths: of the input, the hidden layers and the output.
        last_gain: scale of the output layer's weights; the hidden ones have √2.
    """
    found: list[nn.Module] = []
    for place, (before, after) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(before, after)
        last = place == len(widths) - 2
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        found += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return Layers(*found)


class Actor(nn.Module):
    """Observations [.., d] → parameters of the action distribution [.., width + free]."""

    def __init__(self, inputs: int, distribution: ActionDistribution, hidden: Sequence[int], activation: str):
        super().__init__()
        # Nearly the same output for every observation at first: no action is preferred by accident.
        self.layers = layers([inputs, *hidden, distribution.width], activation, last_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(distribution.free)) if distribution.free else None

    def forward(self, observations: Tensor) -> Tensor:
        found: Tensor = self.layers(observations)
        return found if self.log_std is None else torch.cat([found, self.log_std.expand_as(found)], -1)


class Critic(nn.Module):
    """Observations [.., d] → values [..]."""

    def __init__(self, inputs: int, hidden: Sequence[int], activation: str):
        super().__init__()
        self.layers = layers([inputs, *hidden, 1], activation, last_gain=1.0)

    def forward(self, observations: Tensor) -> Tensor:
        found: Tensor = self.layers(observations)
        return found.squeeze(-1)
