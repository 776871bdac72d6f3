"""Observations as numbers: a batch of whatever a gymnasium space holds, as one float32 tensor [B, d]."""

from collections import OrderedDict
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from taurl.runtime.errors import InputError


def width(space: gymnasium.Space[Any]) -> int:
    """d: how many numbers `encode` makes of one observation. Raises: InputError for a space that it does not know."""
    match space:
        case spaces.Box() | spaces.MultiBinary():
            return int(np.prod(space.shape))
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case spaces.Dict():
            return sum(width(part) for part in space.spaces.values())
        case spaces.Tuple():
            return sum(width(part) for part in space.spaces)
    raise InputError(
        f"observation space {space} is not one of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple; wrap the "
        "environment so that it gives one of these"
    )


def encode(space: gymnasium.Space[Any], batch: Any) -> Tensor:
    """A batch of observations as float32 [B, d]: numbers as they are, choices one-hot, parts side by side."""
    match space:
        case spaces.Box() | spaces.MultiBinary():
            values = np.asarray(batch, dtype=np.float32)
            return torch.from_numpy(values.reshape(len(values), -1))
        case spaces.Discrete():
            return one_hot(np.asarray(batch) - space.start, np.array([space.n]))
        case spaces.MultiDiscrete():
            values = np.asarray(batch) - space.start
            return one_hot(values.reshape(len(values), -1), space.nvec.reshape(-1))
        case spaces.Dict():
            return torch.cat([encode(part, batch[name]) for name, part in space.spaces.items()], 1)
        case spaces.Tuple():
            return torch.cat([encode(part, batch[place]) for place, part in enumerate(space.spaces)], 1)
    raise InputError(f"observation space {space} is not known")


def one_hot(choices: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Tensor:
    """Choices [B] or [B, K] among `sizes` [K] each, as float32 [B, Σ sizes]."""
    choices = choices.reshape(len(choices), -1)
    found = np.zeros((len(choices), int(sizes.sum())), dtype=np.float32)
    found[np.arange(len(choices))[:, None], choices + np.cumsum(sizes) - sizes] = 1.0
    return torch.from_numpy(found)


def described(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """A space as plain values that JSON holds; `space_of` makes it again."""
    kind = type(space).__name__
    match space:
        case spaces.Box():
            bounds = {name: [float(x) for x in getattr(space, name).reshape(-1)] for name in ("low", "high")}
            return {"kind": kind, "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
        case spaces.Discrete():
            return {"kind": kind, "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"kind": kind, "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            return {"kind": kind, "shape": list(space.shape)}
        case spaces.Dict():
            return {"kind": kind, "parts": {name: described(part) for name, part in space.spaces.items()}}
        case spaces.Tuple():
            return {"kind": kind, "parts": [described(part) for part in space.spaces]}
    raise InputError(f"space {space} is not known")


def space_of(facts: dict[str, Any]) -> gymnasium.Space[Any]:
    """The space that `described` described."""
    match facts["kind"]:
        case "Box":
            low, high = (np.array(facts[name]).reshape(facts["shape"]) for name in ("low", "high"))
            return spaces.Box(low.astype(facts["dtype"]), high.astype(facts["dtype"]), dtype=facts["dtype"])
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
