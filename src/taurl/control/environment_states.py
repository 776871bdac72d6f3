"""What environments hold between steps, as text for a checkpoint: `state_text` and `restore`.

gymnasium has no common way to save an environment. One that has `get_state()` and `set_state(state)` is asked for its
state; of any other all attributes are taken: numbers, text, arrays, random generators, lists and dictionaries of these,
MuJoCo's data, members of enumerations, and the same of wrapped environments and of spaces. Functions and types are to
be those that the environment made anew has already. An attribute of another kind (a Box2D world, an emulator, a
process) hides what it holds, and so do arrays that share memory: then there is no state.
"""

import base64
import inspect
import json
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import PassiveEnvChecker

PLAIN = (type(None), bool, int, float, str)
NAMED = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
CONSTANTS = (np.dtype, EnvSpec)
CONSTANT_KINDS = ("MjModel", "MujocoRenderer")  # by name: MuJoCo need not be installed
# Arguments of the constructor: whoever makes the environment again gives them again.
CONSTANT_NAMES = ("_saved_kwargs", "_cached_spec", "_ezpickle_args", "_ezpickle_kwargs", "env_fns")
# The transition tables of gymnasium's toys follow from their arguments alone (a FrozenLake may have a map at random).
CONSTANTS_OF = {"TaxiEnv": ("P",), "CliffWalkingEnv": ("P",)}
OBJECTS = (gymnasium.Env, VectorEnv, gymnasium.Space)
# Of functions written in C those that are bound to one of these hide its state, which is made anew without them.
GENERATORS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
# The global ones, which the checkpoint has.
GLOBAL: tuple[Any, ...] = tuple(getattr(draw, "__self__", None) for draw in (np.random.uniform, random.random))
# Positions that some environments read before they step, and that MuJoCo does not compute again until they do.
MUJOCO_DERIVED = ("xpos", "xipos")


class NoState(Exception):
    """Says which attribute hides the state of an environment."""


def state_text(vector: VectorEnv[Any, Any, Any], others: list[Any]) -> str:
    """The state of all copies, and of other plain values, as JSON. Raises: NoState."""
    writer = _Writer()
    return json.dumps([writer.write(one, path) for one, path in (*_roots(vector), (others, "others"))])


def restore(text: str, vector: VectorEnv[Any, Any, Any]) -> list[Any]:
    """Put back what `state_text` gave into the same environments made anew; returns the other values.

    Raises: NoState, with some of it put back, where they are made otherwise than those that were saved.
    """
    reader = _Reader()
    roots = [one for one, _ in _roots(vector)]
    found = [reader.read(saved, one) for saved, one in zip(json.loads(text), [*roots, None], strict=True)]
    return list(found[-1])


def _roots(vector: VectorEnv[Any, Any, Any]) -> list[tuple[Any, str]]:
    if isinstance(vector, AsyncVectorEnv):
        raise NoState("they run in processes of their own")
    if reason := getattr(vector, "hides_state", None):
        raise NoState(reason)
    if isinstance(vector, SyncVectorEnv):  # what it holds beside them belongs to one step
        return [(one, type(one.unwrapped).__name__) for one in vector.envs]
    return [(vector, type(vector).__name__)]


class _Writer:
    """Values → JSON: plain ones as they are, others as [kind, content]; what was met before as ["same", number]."""

    def __init__(self) -> None:
        self.met: dict[int, tuple[int, Any]] = {}  # with the value itself, so that its id stays taken
        self.arrays: dict[int, list[tuple[Any, str]]] = {}  # by whose memory they are in

    def write(self, value: Any, path: str) -> Any:
        if type(value) in PLAIN:
            return value
        if isinstance(value, Enum):
            return self._member(value, path)
        if id(value) in self.met:
            return ["same", self.met[id(value)][0]]
        self.met[id(value)] = len(self.met), value
        if isinstance(value, OBJECTS):
            return self._object(value, path)
        if type(value) in (list, tuple):
            return [type(value).__name__, self._parts(value, path)]
        if type(value) is deque:
            return ["deque", self._parts(value, path), value.maxlen]
        if type(value) is dict:
            names = [self.write(name, path) for name in value]
            return ["dict", names, [self.write(one, f"{path}[{name!r}]") for name, one in value.items()]]
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            if kind == "array":
                self._refuse_shared(value, path)
            return [kind, value.dtype.str, value.shape, base64.b64encode(value.tobytes()).decode()]
        if isinstance(value, np.random.Generator):
            return ["generator", self.write(value.bit_generator.state, path)]
        raise NoState(f"{path} is of type {type(value).__name__}")

    def _parts(self, values: Any, path: str) -> list[Any]:
        return [self.write(one, f"{path}[{place}]") for place, one in enumerate(values)]

    def _member(self, value: Enum, path: str) -> Any:
        kind = type(value)
        written = ["member", kind.__module__, kind.__qualname__, value.name]
        if _member(*written[1:]) is not value:
            raise NoState(f"{path} is of type {kind.__qualname__}, which cannot be found by its name")
        return written

    def _refuse_shared(self, array: Any, path: str) -> None:
        """Views of one memory would come back as arrays of their own."""
        owner = array
        while isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        others = self.arrays.setdefault(id(owner), [])
        for other, where in others:
            if _share_memory(array, other):
                raise NoState(f"{path} shares memory with {where}")
        others.append((array, path))

    def _object(self, value: Any, path: str) -> Any:
        kind = type(value).__qualname__
        if _tells_its_state(value):
            with _failing_is_no_state(f"{path}.get_state()"):
                state = value.get_state()
            return ["asked", self.write(state, f"{path}.get_state()"), kind]
        written = {}
        for name, one in _attributes(value).items():
            where = f"{path}.{name}"
            if isinstance(one, NAMED):
                if hidden := _hidden_by(one):
                    raise NoState(f"{where} is a method of {type(hidden).__qualname__}, which it hides")
                written[name] = ["named", one.__qualname__]
            elif type(one).__name__ == "MjData":
                written[name] = ["mujoco", self.write(_mujoco(value.model, one), where)]
            else:
                written[name] = self.write(one, where)
        return ["object", written, kind]


class _Reader:
    """JSON → values; objects are filled in place. Numbers what it meets in the writer's order."""

    def __init__(self) -> None:
        self.met: list[Any] = []

    def read(self, saved: Any, current: Any = None) -> Any:
        if type(saved) in PLAIN:
            return saved
        kind, content, *more = saved
        if kind == "same":
            return self.met[content]
        if kind == "member":
            member = _member(content, *more)
            if member is None:
                raise NoState(f"{'.'.join([content, *more])} is not to be found")
            return member
        number = len(self.met)
        self.met.append(current)
        self.met[number] = self._made(kind, content, more, current, number)
        return self.met[number]

    def _made(self, kind: str, content: Any, more: list[Any], current: Any, number: int) -> Any:
        match kind:
            case "object":
                _require(type(current).__qualname__, *more)
                for name, saved in content.items():
                    self._set(current, name, saved)
                return current
            case "asked":
                _require(type(current).__qualname__, *more)
                state = self.read(content)
                with _failing_is_no_state("set_state"):
                    current.set_state(state)
                return current
            case "dict":
                known = current if isinstance(current, dict) else {}
                names = [self.read(name) for name in content]
                return {name: self.read(one, known.get(name)) for name, one in zip(names, *more, strict=True)}
            case "array" | "scalar":
                shape, data = more
                array = np.frombuffer(base64.b64decode(data), dtype=content).reshape(shape).copy()
                return array if kind == "array" else array[()]
            case "generator":
                state = self.read(content)
                generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
                generator.bit_generator.state = state
                return generator
        fits = isinstance(current, list | tuple) and len(current) == len(content)
        others = current if fits else [None] * len(content)
        parts: Any = [self.read(one, other) for one, other in zip(content, others, strict=True)]
        return deque(parts, *more) if kind == "deque" else tuple(parts) if kind == "tuple" else parts

    def _set(self, owner: Any, name: str, saved: Any) -> None:
        current = getattr(owner, name, None)
        if isinstance(saved, list) and saved[0] == "named":
            _require(getattr(current, "__qualname__", type(current).__qualname__), saved[1])
        elif isinstance(saved, list) and saved[0] == "mujoco":
            _require(type(current).__name__, "MjData")
            _restore_mujoco(owner.model, current, self.read(saved[1]))
        else:
            setattr(owner, name, self.read(saved, current))


def _hidden_by(function: Any) -> Any:
    """The object with a state of its own that a method is bound to, and that nothing else leads to."""
    owner = getattr(function, "__self__", None)
    if any(owner is known for known in GLOBAL):
        return None
    if isinstance(function, types.MethodType):
        return None if isinstance(owner, (*OBJECTS, type)) else owner
    return owner if isinstance(owner, GENERATORS) else None


def _tells_its_state(value: Any) -> bool:
    """Whether it has `get_state()` and `set_state(state)`, and not others of these names, such as MuJoCo's."""
    try:
        inspect.signature(value.get_state).bind()
        inspect.signature(value.set_state).bind(None)
    except (AttributeError, TypeError, ValueError):
        return False
    return True


@contextmanager
def _failing_is_no_state(what: str) -> Iterator[None]:
    """Somebody's own code may raise what it likes."""
    try:
        yield
    except Exception as error:
        raise NoState(f"{what} raised {type(error).__name__}: {error}") from error


def _member(module: str, kind: str, name: str) -> Any:
    """The member of an enumeration; None where it is none of a module that is imported."""
    found: Any = sys.modules.get(module)
    for part in (*kind.split("."), name):
        found = getattr(found, str(part), None)
    return found


def _share_memory(array: Any, other: Any) -> bool:
    try:
        return np.shares_memory(array, other, max_work=1000)  # type: ignore[arg-type]  # any number of tries
    except np.exceptions.TooHardError:
        return True


def _require(found: str, saved: str = "something unknown") -> None:
    if found != saved:
        raise NoState(f"a {found} is where a {saved} was saved")


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes that may change."""
    if isinstance(value, PassiveEnvChecker):  # looks at an environment's first steps only, and they are over
        return {"env": value.env, "checked_reset": True, "checked_step": True, "checked_data_reuse": True}
    constant = CONSTANT_NAMES + CONSTANTS_OF.get(type(value).__name__, ())
    return {
        name: one
        for name, one in vars(value).items()
        if name not in constant and not isinstance(one, CONSTANTS) and type(one).__name__ not in CONSTANT_KINDS
    }


def _mujoco(model: Any, data: Any) -> dict[str, Any]:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return {"integration": state, **{name: getattr(data, name).copy() for name in MUJOCO_DERIVED}}


def _restore_mujoco(model: Any, data: Any, saved: dict[str, Any]) -> None:
    import mujoco

    mujoco.mj_setState(model, data, saved["integration"], mujoco.mjtState.mjSTATE_INTEGRATION)
    for name in MUJOCO_DERIVED:
        getattr(data, name)[:] = saved[name]
