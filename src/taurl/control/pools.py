"""envpool's environments as a vector environment. Imported when they are asked for: it needs envpool."""

import contextlib
import difflib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import envpool
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from taurl.runtime.errors import InputError

LARGEST_SEED = 2**31  # envpool keeps seeds in 32 bits with a sign


class Pool(VectorEnv[Any, Any, Any]):
    """Copies that envpool steps in threads of its own; each resets on its own next step.

    envpool seeds its copies when they are made: a reset makes them anew. An episode that ends by itself in the very
    step of its time limit is called truncated by envpool.

    Args:
        name: an id that envpool knows, or one of ALE/…, for which it has names without that.
        arguments: of that environment; `num_threads` is envpool's own.
    Raises: InputError when there is no such id; TypeError when there is no such argument.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 as in the class above it
    hides_state = "envpool keeps it to itself"

    def __init__(self, name: str, count: int, arguments: dict[str, Any]):
        self.num_envs, self.name, self.arguments = count, envpools_name(name), arguments
        with quiet():
            spec = envpool.make_spec(self.name, num_envs=count, **arguments)
            self.single_observation_space = spec.gymnasium_observation_space
            self.single_action_space = spec.gymnasium_action_space
        self.observation_space = batch_space(self.single_observation_space, count)
        self.action_space = batch_space(self.single_action_space, count)
        self.pool: Any = None

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self.close_extras()
        first = 0 if seed is None else seed
        seeds = np.asarray([first + copy for copy in range(self.num_envs)] if isinstance(first, int) else first)
        with quiet():
            self.pool = envpool.make_gymnasium(
                self.name, num_envs=self.num_envs, seed=seeds % LARGEST_SEED, **self.arguments
            )
            found: tuple[Any, dict[str, Any]] = self.pool.reset()
        return found

    def step(self, actions: Any) -> Any:
        return self.pool.step(actions)

    def close_extras(self, **_: Any) -> None:
        if self.pool is not None:
            self.pool.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that bounds which envpool has in 64 bits lose precision in spaces of 32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting")
        yield


def envpools_name(name: str) -> str:
    """The id as envpool spells it. Raises: InputError with what is near."""
    known = envpool.list_all_envs()
    plain = name.removeprefix("ALE/")
    if plain not in known:
        near = difflib.get_close_matches(plain, known, n=4)
        others = f"near are {', '.join(near)}" if near else f"envpool.list_all_envs() names the {len(known)} there are"
        raise InputError(f"env is {name!r}, which envpool does not have; {others}")
    return str(plain)
