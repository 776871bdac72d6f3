"""Convolutions: what a network sees of observations that have images in them."""

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import torch
from gymnasium import spaces
from torch import Tensor, nn

from taurl.control.dense import WithPullback, differentiated
from taurl.control.spaces import BYTES, is_image, leaves, width

SMALLEST = 36  # pixels, of the side of an image that the large network's three layers still see something of
ROWS = 512  # convolved at once: the activations of a whole rollout would take gigabytes


class Features(nn.Module):
    """Encoded observations with images in them, uint8 [.., d] → features, float32 [.., width].

    Each image goes through convolutions of its own; numbers stand beside what becomes of it.

    Attributes:
        width: of the features.
    """

    def __init__(self, space: gymnasium.Space[Any]):
        super().__init__()
        parts = list(leaves(space))
        convolutions = [Convolution(part) for part in parts if is_image(part)]
        self.convolutions = nn.ModuleList(convolutions)
        self.columns = [width(part) if is_image(part) else width(part) * BYTES for part in parts]
        self.are_images = [is_image(part) for part in parts]
        numbers = sum(width(part) for part in parts if not is_image(part))
        self.width = numbers + sum(convolution.width for convolution in convolutions)

    def forward(self, observations: Tensor) -> Tensor:
        rows = observations.flatten(0, -2)
        features = torch.cat([self._of(some) for some in torch.split(rows, ROWS)])
        return features.view(*observations.shape[:-1], self.width)

    def hidden(self, hidden: Sequence[int]) -> Sequence[int]:
        """Widths of hidden layers after the features: none after those of images alone, as in PPO's reference code."""
        return () if all(self.are_images) else hidden

    def with_pullback(self) -> WithPullback:
        """Observations [N, d] → features [N, width] and their pullback, by automatic differentiation."""
        return lambda observations: differentiated(self, torch.from_numpy(observations))

    def _of(self, rows: Tensor) -> Tensor:
        convolutions = iter(self.convolutions)
        found = []
        for part, image in zip(torch.split(rows, self.columns, -1), self.are_images, strict=True):
            found.append(next(convolutions)(part) if image else numbers_of(part))
        return torch.cat(found, -1) if len(found) > 1 else found[0]


def numbers_of(columns: Tensor) -> Tensor:
    """Bytes [N, 4 · k] → the numbers that they are, float32 [N, k]."""
    # Copied, since they need not begin where a float32 may; `contiguous` would leave a single row where it is.
    return columns.clone(memory_format=torch.contiguous_format).view(torch.float32)


class Convolution(nn.Module):
    """Images as rows of bytes [N, height · width · channels] → features, float32 [N, width], none below 0.

    Pixels are scaled to between 0 and 1. Images of at least 36 × 36 go through the network of Mnih et al. 2015
    (doi:10.1038/nature14236): 32 filters of 8 × 8 at stride 4, 64 of 4 × 4 at 2, 64 of 3 × 3 at 1, 512 units. Smaller
    ones, of grid worlds, through one that fits any size: 16 filters of 3 × 3 at stride 1, 32 of 3 × 3 at 2, both
    padded, 128 units. ReLU after each, orthogonal weights of gain √2, biases of 0, as PPO's reference code has them.

    Args:
        space: of one image, [height, width, channels] or [channels, height, width]: the fewer are the channels.
    """

    def __init__(self, space: gymnasium.Space[Any]):
        super().__init__()
        assert isinstance(space, spaces.Box)
        self.shape, self.scale = space.shape, 1 / max(1.0, float(space.high.max()))
        self.channels_first = space.shape[0] < space.shape[2]
        channels, *size = space.shape if self.channels_first else (space.shape[2], *space.shape[:2])
        if min(size) >= SMALLEST:
            filters = [nn.Conv2d(channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
            self.width = 512
        else:
            filters = [nn.Conv2d(channels, 16, 3, 1, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1)]
            self.width = 128
        for one in filters:
            size = [(side + 2 * int(one.padding[0]) - one.kernel_size[0]) // one.stride[0] + 1 for side in size]
        units = nn.Linear(filters[-1].out_channels * math.prod(size), self.width)
        for weight, bias in [(one.weight, one.bias) for one in filters] + [(units.weight, units.bias)]:
            assert bias is not None
            nn.init.orthogonal_(weight, math.sqrt(2))
            nn.init.zeros_(bias)
        self.filters, self.units = nn.ModuleList(filters), units

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.reshape(-1, *self.shape)
        if not self.channels_first:
            images = images.permute(0, 3, 1, 2)
        found = images.float().mul_(self.scale).contiguous(memory_format=torch.channels_last)
        for one in self.filters:
            found = one(found).relu_()
        units: Tensor = self.units(found.flatten(1))
        return units.relu_()
