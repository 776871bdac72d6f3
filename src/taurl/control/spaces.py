"""Observations as numbers: a batch of whatever a gymnasium space holds, as one tensor [B, d].

Without images it is float32. With images in it, it is uint8: pixels stay the bytes that they are, a quarter of the
memory, and numbers beside them are kept as the four bytes of their float32, which `images.Features` reads again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from taurl.runtime.errors import InputError

BYTES = 4  # of a float32
SMALLEST_SIDE = 32  # of a frame; fewer bytes may be a board


def is_image(space: gymnasium.Space[Any]) -> bool:
    """Whether a space holds images: a Box of bytes or booleans with three dimensions, channels first or last."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype in (np.uint8, np.bool_)


def refuse_stacked_images(space: gymnasium.Space[Any]) -> None:
    """Raises: InputError for frames of bytes in two or four dimensions, which would be read as so many numbers."""
    for leaf in leaves(space):
        if not isinstance(leaf, spaces.Box) or leaf.dtype != np.uint8 or len(leaf.shape) not in (2, 4):
            continue
        if sorted(leaf.shape)[-2] >= SMALLEST_SIDE and (leaf.high == 255).all():
            raise InputError(
                f"observation space {leaf} looks like images, which have three dimensions here, channels first or "
                "last: make channels of stacked frames, with gymnasium.wrappers.ReshapeObservation for example; bytes "
                "that are no pixels go through FlattenObservation"
            )


def leaves(space: gymnasium.Space[Any]) -> Iterator[gymnasium.Space[Any]]:
    """The spaces that are no Dict and no Tuple, in the order in which `encode` sets them side by side."""
    match space:
        case spaces.Dict():
            for part in space.spaces.values():
                yield from leaves(part)
        case spaces.Tuple():
            for part in space.spaces:
                yield from leaves(part)
        case _:
            yield space


def has_images(space: gymnasium.Space[Any]) -> bool:
    """Whether some part of a space holds images."""
    return any(map(is_image, leaves(space)))


def width(space: gymnasium.Space[Any]) -> int:
    """d: how many columns `encode` makes of one observation. Raises: InputError for a space that it does not know."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        bytes_of_number = BYTES if has_images(space) else 1
        return sum(width(leaf) * (1 if is_image(leaf) else bytes_of_number) for leaf in leaves(space))
    match space:
        case spaces.Box() | spaces.MultiBinary():
            return int(np.prod(space.shape))
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
    raise InputError(
        f"observation space {space} is not one of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple; wrap the "
        "environment so that it gives one of these"
    )


def encode(space: gymnasium.Space[Any], batch: Any) -> Tensor:
    """A batch of observations as [B, d]: numbers as they are, choices one-hot, parts side by side."""
    match space:
        case spaces.Box() if is_image(space):
            pixels = np.ascontiguousarray(batch, dtype=np.uint8)
            return torch.from_numpy(pixels.reshape(len(pixels), -1))
        case spaces.Box() | spaces.MultiBinary():
            values = np.asarray(batch, dtype=np.float32)
            return torch.from_numpy(values.reshape(len(values), -1))
        case spaces.Discrete():
            return one_hot(np.asarray(batch) - space.start, np.array([space.n]))
        case spaces.MultiDiscrete():
            values = np.asarray(batch) - space.start
            return one_hot(values.reshape(len(values), -1), space.nvec.reshape(-1))
        case spaces.Dict():
            return beside([encode(part, batch[name]) for name, part in space.spaces.items()])
        case spaces.Tuple():
            return beside([encode(part, batch[place]) for place, part in enumerate(space.spaces)])
    raise InputError(f"observation space {space} is not known")


def require_member(space: gymnasium.Space[Any], observation: Any) -> None:
    """Refuse an observation whose shape, choice or parts do not fit its space. Raises: InputError."""
    problem = misfit(space, observation)
    if problem:
        raise InputError(f"the observation {problem}; expected one of {space}")


def misfit(space: gymnasium.Space[Any], observation: Any) -> str:
    """What is wrong with one observation; nothing where it fits. The bounds of a box are no matter."""
    match space:
        case spaces.Dict():
            if not isinstance(observation, Mapping) or set(observation) != set(space.spaces):
                found = sorted(observation) if isinstance(observation, Mapping) else type(observation).__name__
                return f"is {found}, not a dict with {', '.join(space.spaces)}"
            parts = ((f"[{name!r}]", part, observation[name]) for name, part in space.spaces.items())
        case spaces.Tuple():
            if not isinstance(observation, tuple) or len(observation) != len(space.spaces):
                return f"is a {type(observation).__name__}, not a tuple of {len(space.spaces)}"
            parts = ((f"[{place}]", part, observation[place]) for place, part in enumerate(space.spaces))
        case _:
            return _leaf_misfit(space, np.asarray(observation))
    return next((f"{place} {problem}" for place, part, value in parts if (problem := misfit(part, value))), "")


def _leaf_misfit(space: gymnasium.Space[Any], value: np.ndarray[Any, Any]) -> str:
    if value.dtype.kind not in "biuf":
        return f"is {value!r}, no number"
    if value.shape != space.shape:
        return f"has shape {value.shape}, not {space.shape}"
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        if value.dtype.kind not in "biu":
            return f"is {value} of {value.dtype}, no whole number"
        if not ((value >= space.start) & (value < space.start + sizes)).all():
            return f"is {value}, outside {space.start} to {space.start + sizes - 1}"
    return ""


def beside(parts: list[Tensor]) -> Tensor:
    """Encoded parts [B, ..] side by side; as bytes where one of them is of bytes."""
    if any(part.dtype == torch.uint8 for part in parts):
        parts = [part.view(torch.uint8) for part in parts]
    return torch.cat(parts, 1)


def one_hot(choices: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Tensor:
    """Choices [B] or [B, K] among `sizes` [K] each, as float32 [B, Σ sizes]."""
    choices = choices.reshape(len(choices), -1)
    found = np.zeros((len(choices), int(sizes.sum())), dtype=np.float32)
    found[np.arange(len(choices))[:, None], choices + np.cumsum(sizes) - sizes] = 1.0
    return torch.from_numpy(found)


def described(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """A space as plain values that JSON holds; `space_of` makes it again."""
    match space:  # a subclass is what it is a kind of
        case spaces.Box():
            bounds = {name: plain(getattr(space, name)) for name in ("low", "high")}
            return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
        case spaces.Discrete():
            return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "shape": list(space.shape)}
        case spaces.Dict():
            return {"kind": "Dict", "parts": {name: described(part) for name, part in space.spaces.items()}}
        case spaces.Tuple():
            return {"kind": "Tuple", "parts": [described(part) for part in space.spaces]}
    raise InputError(f"space {space} is not known")


def plain(bounds: np.ndarray[Any, Any]) -> float | list[float]:
    """Bounds of a box as numbers; as one where all are the same, since an image has tens of thousands."""
    numbers: list[float] = bounds.reshape(-1).tolist()  # whole ones of 64 bits would not all fit a float
    return numbers[0] if len(set(numbers)) == 1 else numbers


def space_of(facts: dict[str, Any]) -> gymnasium.Space[Any]:
    """The space that `described` described."""
    match facts["kind"]:
        case "Box":
            given = (np.array(facts[name], dtype=facts["dtype"]) for name in ("low", "high"))
            low, high = (np.resize(bounds, facts["shape"]) for bounds in given)
            return spaces.Box(low, high, dtype=facts["dtype"])
        case "Discrete":
            return spaces.Discrete(facts["n"], start=facts["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(facts["nvec"], start=facts["start"])
        case "MultiBinary":
            shape = facts["shape"]
            return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
        case "Dict":
            # A plain dictionary would be sorted, and the policy's inputs with it.
            return spaces.Dict(OrderedDict((name, space_of(part)) for name, part in facts["parts"].items()))
        case "Tuple":
            return spaces.Tuple([space_of(part) for part in facts["parts"]])
    raise InputError(f"space {facts} is not known")
