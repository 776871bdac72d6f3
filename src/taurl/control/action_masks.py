"""Action masks: which actions an environment allows, found where environments say it.

Either as `info["action_mask"]` of `reset` and `step` (Taxi), or by a method `action_masks()` (the way of sb3-contrib).
True is allowed. For MultiDiscrete the choices' masks come side by side in one array, or as one array each in a tuple.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from taurl.runtime.errors import InputError, RunError

Array = np.ndarray[Any, Any]
KEY, METHOD = "action_mask", "action_masks"


class ActionMasks:
    """Reads the masks of all copies of an environment.

    Args:
        name: of the environment, for messages.
        space: its action space.
    Raises: InputError for an action space that no mask is for.
    """

    def __init__(self, name: str, space: gymnasium.Space[Any]):
        self.name = name
        match space:
            case spaces.Discrete():
                choices = [int(space.n)]
            case spaces.MultiDiscrete():
                choices = [int(n) for n in space.nvec.reshape(-1)]
            case _:
                raise InputError(
                    f"{name}: mask_actions is on, but the action space {space} is neither Discrete nor MultiDiscrete; "
                    "turn it off"
                )
        self.width = sum(choices)
        self.first = np.cumsum([0, *choices[:-1]])  # where each choice's actions begin

    def read(self, vector: Any, infos: dict[str, Any], ended: Array, step: int) -> Array:
        """What may be done next.

        Args:
            vector: the vector environment, to be asked where the infos hold no masks.
            infos: of its reset or step.
            ended: bool [B], copies whose next step only resets: whatever they are told to do.
            step: for messages.
        Returns: bool [B, n], n actions of all choices side by side.
        Raises: InputError if there are no masks, or not of this width; RunError for one that forbids everything.
        """
        masks = rows(infos[KEY] if KEY in infos else self._asked(vector))
        if masks.shape != (len(ended), self.width):
            raise InputError(f"{self.name}: an action mask has {masks.shape[1]} entries, expected {self.width}")
        masks[ended] = True
        stuck = ~np.logical_or.reduceat(masks, self.first, axis=1).all(1)
        if stuck.any():
            copy = int(np.flatnonzero(stuck)[0])
            raise RunError(
                f"{self.name}: the action mask of copy {copy} allows nothing at step {step}: "
                f"{masks[copy].astype(int).tolist()}, expected an action for each choice; end the episode instead"
            )
        return masks

    def _asked(self, vector: Any) -> Any:
        if not hasattr(vector, "call"):  # a vector class of its own
            raise missing(self.name)
        try:
            return vector.call(METHOD)
        except AttributeError as error:
            if METHOD not in str(error):  # its own, from within
                raise
            raise missing(self.name) from None


def single_mask(environment: gymnasium.Env[Any, Any], info: dict[str, Any]) -> Any:
    """What may be done next in one environment, as it says it. Raises: InputError if it does not."""
    if KEY in info:
        return info[KEY]
    if not environment.has_wrapper_attr(METHOD):
        raise missing(str(environment))
    return environment.get_wrapper_attr(METHOD)()


def rows(masks: Any) -> Array:
    """A mask of each copy, whatever it comes as, as bool [B, n]."""
    if isinstance(masks, np.ndarray) and masks.dtype != object:
        return masks.reshape(len(masks), -1).astype(bool)
    return np.stack([np.concatenate([np.ravel(part) for part in one]) for one in masks]).astype(bool)


def missing(name: str) -> InputError:
    return InputError(
        f"{name}: mask_actions is on, but it gives no info[{KEY!r}] and has no method {METHOD}(); turn it off"
    )
