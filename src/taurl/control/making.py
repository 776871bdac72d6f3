"""Making environments: by id, function or object; one or several at once; Atari games and envpool among them."""

import contextlib
import copy
import difflib
import functools
import importlib
import inspect
import multiprocessing.util
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, VectorEnv

from taurl.runtime.errors import InputError

PATIENCE = 5.0  # seconds in which environments in processes of their own are to close
NATIVE_FROM = 4  # copies; fewer are faster one after the other (CartPole: 9 µs each, 40 µs for any number in numpy)

EnvironmentLike = str | Callable[[], gymnasium.Env[Any, Any]] | gymnasium.Env[Any, Any]


def make_vector(
    environment: EnvironmentLike, count: int, arguments: dict[str, Any], vectorization: str
) -> VectorEnv[Any, Any, Any]:
    """The vector environment, vector-native where the environment has such a class and there are enough copies."""
    if vectorization == "envpool" and not isinstance(environment, str):
        raise InputError("vectorization is envpool, which makes environments by id; an object or function was given")
    if isinstance(environment, gymnasium.Env):
        if vectorization == "async":
            raise InputError(
                "vectorization is async, but one environment object was given; give a function that makes one"
            )
        if count != 1:
            raise InputError(
                f"environments is {count}, but one environment object was given; give a function that makes one"
            )
        made: gymnasium.Env[Any, Any] = environment
        return synchronous([lambda: made])
    if callable(environment):
        return from_makers([environment] * count, vectorization)
    if not isinstance(environment, str):
        raise InputError(
            f"env is of type {type(environment).__name__}, expected an id, a function that makes an environment, or "
            "an environment; how many are stepped together is the setting environments"
        )
    with named(environment):
        name = registered(environment)
        if vectorization == "envpool":
            return pool(name, count, arguments)
        if vectorization == "auto" and is_atari(name):
            games: VectorEnv[Any, Any, Any] = atari().Games(name, count, arguments)
            return games
        native_class = gymnasium.spec(name).vector_entry_point is not None
        if vectorization == "auto" and native_class and count >= NATIVE_FROM:
            native: VectorEnv[Any, Any, Any] = gymnasium.make_vec(name, num_envs=count, **arguments)
            return native
        return from_makers([lambda: make_single(environment, arguments)] * count, vectorization)


def make_single(name: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """One environment by its id, as `make_vector` makes several. Raises: what gymnasium raises."""
    name = registered(name)
    if is_atari(name):
        made: gymnasium.Env[Any, Any] = atari().game(name, arguments)
        return made
    return gymnasium.make(name, **arguments)


def registered(name: str) -> str:
    """The id in `module:id`, gymnasium's form for environments that a module registers, once that is imported.

    The module is looked for in the current folder too, after what is installed. Raises: InputError when there is none.
    """
    module, _, identifier = name.rpartition(":")
    if module:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise InputError(
                f"env is {name!r}: {module} cannot be imported ({error}); it is looked for among what is installed "
                "and in the current folder"
            ) from error
    return identifier


@contextlib.contextmanager
def named(environment: str) -> Iterator[None]:
    """Say of which environment it is when it cannot be made."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each environment has its own for arguments that it does not take
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if hint := _hint(environment.rpartition(":")[2]):  # gymnasium's own has no version in it
            text = re.sub(r"\.? ?Did you mean: `[^`]*`\?", "", text)
        raise InputError(f"env is {environment!r}: cannot be made: {text}{hint}") from error


def _hint(environment: str) -> str:
    """The registered id that is nearest, or the arguments that the environment has."""
    known = gymnasium.registry
    if environment in known:
        entry = known[environment].entry_point
        try:
            maker = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
            names = [name for name in inspect.signature(maker).parameters if name not in ("kwargs", "args")]  # type: ignore[arg-type]
        except (ImportError, TypeError, ValueError):
            return ""
        return f"; its arguments: {', '.join(names)}" if names else ""
    versions = sorted(name for name in known if name.rpartition("-v")[0] == environment)
    close = versions[-1:] or difflib.get_close_matches(environment, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def pool(name: str, count: int, arguments: dict[str, Any]) -> VectorEnv[Any, Any, Any]:
    """envpool's copies."""
    pools = with_extra("pools", "envpool", f"vectorization is envpool for {name}")
    given = atari().of_envpool(name, arguments) if is_atari(name) else arguments
    found: VectorEnv[Any, Any, Any] = pools.Pool(name, count, given)
    return found


def is_atari(environment: EnvironmentLike) -> bool:
    """Whether it is a game of the Arcade Learning Environment that is preprocessed here."""
    if not isinstance(environment, str):
        return False
    name = environment.rpartition(":")[2]
    return name.startswith("ALE/") or name.endswith("NoFrameskip-v4")


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
        raise InputError(f"{what}: needs {error.name}; in taurl's folder, pip install -e '.[{extra}]'") from error


def from_makers(makers: list[Callable[[], gymnasium.Env[Any, Any]]], vectorization: str) -> VectorEnv[Any, Any, Any]:
    """Copies made by functions, each in a process of its own or one after the other."""
    return asynchronous(makers) if vectorization == "async" else synchronous(makers)


class OneAfterTheOther(gymnasium.vector.SyncVectorEnv):
    """gymnasium's, but the last observation of an episode is a copy: the reset that follows may overwrite it."""

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        if "final_obs" in env_info:
            env_info = {**env_info, "final_obs": copy.deepcopy(env_info["final_obs"])}
        return super()._add_info(vector_infos, env_info, env_num)


class Copied(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Observations that stay what they are when the environment goes on in the same memory."""

    def observation(self, observation: Any) -> Any:
        return copy.deepcopy(observation)


def synchronous(makers: list[Callable[[], gymnasium.Env[Any, Any]]]) -> VectorEnv[Any, Any, Any]:
    made = OneAfterTheOther(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    if len({id(one.unwrapped) for one in made.envs}) < len(made.envs):
        raise InputError("the function that makes environments gave the same environment twice, expected new ones")
    return made


def asynchronous(makers: list[Callable[[], gymnasium.Env[Any, Any]]]) -> VectorEnv[Any, Any, Any]:
    copied = [functools.partial(_made_copied, maker) for maker in makers]
    return InProcesses(copied, autoreset_mode=AutoresetMode.SAME_STEP)


class InProcesses(gymnasium.vector.AsyncVectorEnv):
    """gymnasium's, but its processes end when it is closed or the interpreter ends, whatever has become of them.

    They do not end by SIGTERM, by which both gymnasium and multiprocessing would end them.
    """

    def __init__(self, *arguments: Any, **named: Any):
        try:
            super().__init__(*arguments, **named)
        finally:  # with this priority before multiprocessing waits for what it has sent a SIGTERM
            processes = getattr(self, "processes", [])
            multiprocessing.util.Finalize(self, end, args=(processes, 0.0), exitpriority=0)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        for pipe in self.parent_pipes if not terminate else ():
            with contextlib.suppress(OSError, AttributeError):  # its process is gone, or was given up
                pipe.send(("close", None))
        end(self.processes, 0.0 if terminate else PATIENCE)
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()


def end(processes: Iterable[Any], patience: float) -> None:
    """Wait for processes that were asked to end, all of them so many seconds, and kill those that do not."""
    until = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()


def _made_copied(maker: Callable[[], gymnasium.Env[Any, Any]]) -> gymnasium.Env[Any, Any]:
    if multiprocessing.current_process().name.startswith("Worker<"):  # as gymnasium names them
        # Ctrl-C goes to all processes of the terminal, and a scheduler's SIGTERM to all of the job; the run's own
        # process finishes its step, for which it needs these.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return Copied(maker())
