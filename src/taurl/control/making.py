"""Making environments: by id, function or object; one or several at once; Atari games and envpool among them."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, VectorEnv

from taurl.runtime.errors import InputError

EnvironmentLike = str | Callable[[], gymnasium.Env[Any, Any]] | gymnasium.Env[Any, Any]


def make_vector(
    environment: EnvironmentLike, count: int, arguments: dict[str, Any], vectorization: str
) -> VectorEnv[Any, Any, Any]:
    """The vector environment, vector-native where the environment has such a class and nothing else is asked for."""
    if vectorization == "envpool" and not isinstance(environment, str):
        raise InputError("vectorization is envpool, which makes environments by id; an object or function was given")
    if isinstance(environment, gymnasium.Env):
        if count != 1:
            raise InputError(
                f"environments is {count}, but one environment object was given; give a function that makes one"
            )
        made: gymnasium.Env[Any, Any] = environment
        return synchronous([lambda: made])
    if callable(environment):
        return from_makers([environment] * count, vectorization)
    with named(environment):
        if vectorization == "envpool":
            return pool(environment, count, arguments)
        if vectorization == "auto" and is_atari(environment):
            games: VectorEnv[Any, Any, Any] = atari().Games(environment, count, arguments)
            return games
        if vectorization == "auto" and gymnasium.spec(environment).vector_entry_point is not None:
            native: VectorEnv[Any, Any, Any] = gymnasium.make_vec(environment, num_envs=count, **arguments)
            return native
        return from_makers([lambda: make_single(environment, arguments)] * count, vectorization)


def make_single(name: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """One environment by its id, as `make_vector` makes several. Raises: what gymnasium raises."""
    if is_atari(name):
        made: gymnasium.Env[Any, Any] = atari().game(name, arguments)
        return made
    return gymnasium.make(name, **arguments)


@contextlib.contextmanager
def named(environment: str) -> Iterator[None]:
    """Say of which environment it is when it cannot be made."""
    try:
        yield
    except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"env is {environment!r}: cannot be made: {text}") from error


def pool(name: str, count: int, arguments: dict[str, Any]) -> VectorEnv[Any, Any, Any]:
    """envpool's copies."""
    pools = with_extra("pools", "envpool", f"vectorization is envpool for {name}")
    given = atari().of_envpool(name, arguments) if is_atari(name) else arguments
    found: VectorEnv[Any, Any, Any] = pools.Pool(name, count, given)
    return found


def is_atari(environment: EnvironmentLike) -> bool:
    """Whether it is a game of the Arcade Learning Environment that is preprocessed here."""
    return isinstance(environment, str) and (environment.startswith("ALE/") or environment.endswith("NoFrameskip-v4"))


def learning_view(environment: EnvironmentLike, arguments: dict[str, Any]) -> Any:
    """What learning is shown of an environment in place of what it gives; None where that is the same."""
    if not is_atari(environment):
        return None
    return atari().LearningView(**{name: arguments[name] for name in atari().FOR_LEARNING if name in arguments})


def atari() -> Any:
    """The module of Atari games, which needs what not everybody has installed."""
    return with_extra("atari", "atari", "the games of ALE/…")


def with_extra(module: str, extra: str, what: str) -> Any:
    """A module of this wing that needs an extra. Raises: InputError when that is not installed."""
    try:
        return importlib.import_module(f"taurl.control.{module}")
    except ModuleNotFoundError as error:
        raise InputError(f"{what}: needs {error.name}; pip install 'taurl[{extra}]'") from error


def from_makers(makers: list[Callable[[], gymnasium.Env[Any, Any]]], vectorization: str) -> VectorEnv[Any, Any, Any]:
    """Copies made by functions, each in a process of its own or one after the other."""
    return asynchronous(makers) if vectorization == "async" else synchronous(makers)


def synchronous(makers: list[Callable[[], gymnasium.Env[Any, Any]]]) -> VectorEnv[Any, Any, Any]:
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def asynchronous(makers: list[Callable[[], gymnasium.Env[Any, Any]]]) -> VectorEnv[Any, Any, Any]:
    return gymnasium.vector.AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
