"""Tables of action values: observations as rows, what a checkpoint holds, and the policy that a table makes."""

import math
from pathlib import Path
from typing import Any, Self

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from taurl.control.environments import Array, Environments, batched
from taurl.control.policy_files import facts_of, read_policy, write_policy
from taurl.control.spaces import require_member, space_of
from taurl.control.updates import require_fit
from taurl.runtime.errors import InputError

KIND = "table"
MAXIMUM_CELLS = 50_000_000  # of one table: 400 MB, and as much again for the visits


def state_count(space: gymnasium.Space[Any]) -> int:
    """S: how many observations there are. Raises: InputError for a space that is not made of choices."""
    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return math.prod(int(n) for n in space.nvec.reshape(-1))
        case spaces.Tuple():
            return math.prod(state_count(part) for part in space.spaces)
    raise InputError(
        f"observation space {space} is not one of Discrete, MultiDiscrete and a Tuple of them, which a table needs; "
        "take an algorithm with a network, such as dqn"
    )


def state_index(space: gymnasium.Space[Any], batch: Any) -> Array:
    """The row of each observation of a batch, int64 [B]."""
    match space:
        case spaces.Discrete():
            return np.asarray(batch, dtype=np.int64) - int(space.start)
        case spaces.MultiDiscrete():
            choices = np.asarray(batch, dtype=np.int64) - space.start
            return np.asarray(np.ravel_multi_index(tuple(choices.reshape(len(choices), -1).T), space.nvec.reshape(-1)))
        case spaces.Tuple():
            sizes = [state_count(part) for part in space.spaces]
            parts = [state_index(part, batch[place]) for place, part in enumerate(space.spaces)]
            return np.asarray(np.ravel_multi_index(tuple(parts), sizes))
    raise InputError(f"observation space {space} is not known")


class Table:
    """K tables of S × A action values, learnt together, with the updates that each cell has had.

    Attributes:
        values: float64 [K, S, A], zeros at first.
        visits: int64 [K, S, A].
        next_actions: int64 [B], the actions that are already chosen, where the rule chooses them ahead.
    """

    def __init__(self, tables: int, states: int, actions: int, *, ahead: int = 0):
        self.values = torch.zeros(tables, states, actions, dtype=torch.float64)
        self.visits = torch.zeros(tables, states, actions, dtype=torch.int64)
        self.next_actions = torch.zeros(ahead, dtype=torch.int64)
        self.changes = 0

    def learn(
        self, cells: tuple[Tensor, Tensor, Tensor], targets: Tensor, *, rate: float, visit_exponent: float
    ) -> None:
        """Move cells towards their targets, one after the other: a cell that is there twice moves twice.

            N(s, a) ← N(s, a) + 1,   Q(s, a) ← Q(s, a) + α / N(s, a)^ω · (target − Q(s, a))

        Args:
            cells: table, state and action of each, int64 [N].
            targets: float [N], all estimated before the first of these updates.
            rate, visit_exponent: α and ω.
        """
        self.changes += 1
        values, visits = self.values.view(-1).numpy(), self.visits.view(-1).numpy()  # the same memory
        _, states, actions = self.values.shape
        places = (cells[0] * states + cells[1]) * actions + cells[2]
        # A loop over numbers: in order, which an operation on a whole batch with repeated cells is not.
        for place, target in zip(places.tolist(), targets.tolist(), strict=True):
            visits[place] += 1
            step = rate / float(visits[place]) ** visit_exponent
            values[place] += step * (target - values[place])

    def mean(self) -> Tensor:
        """The action values that the tables agree on, [S, A]."""
        return self.values.mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"values": self.values, "visits": self.visits, "next_actions": self.next_actions}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave. Raises: InputError if it does not fit."""
        require_fit(tensors, self.tensors())
        self.values.copy_(tensors["values"])
        self.visits.copy_(tensors["visits"])
        self.next_actions = tensors["next_actions"].clone()


class TablePolicy:
    """The greedy policy of a table, the first of equal actions; sampled, it is ε-greedy with the ε it was saved with.

    Attributes:
        values: float64 [S, A].
        epsilon: of the sampled policy.
        facts: `env`, `env_args` and the spaces.
    """

    def __init__(self, values: Tensor, epsilon: float, facts: dict[str, Any]):
        self.values, self.epsilon, self.facts = values, epsilon, facts
        self.observation_space = space_of(facts["observation_space"])
        self.start = int(facts["action_space"]["start"])

    @classmethod
    def create(cls, environments: Environments, config: Any) -> Self:
        """A policy for these spaces that knows nothing yet. Raises: InputError where there can be no table."""
        actions = environments.action_space
        if not isinstance(actions, spaces.Discrete):
            raise InputError(f"action space {actions} is not Discrete, which a table needs; take another algorithm")
        states = state_count(environments.observation_space)
        if states * int(actions.n) > MAXIMUM_CELLS:
            raise InputError(
                f"a table of {states} observations × {actions.n} actions is too large, expected at most "
                f"{MAXIMUM_CELLS} cells; take an algorithm with a network, such as dqn"
            )
        facts = facts_of(environments, config, kind=KIND)
        return cls(torch.zeros(states, int(actions.n), dtype=torch.float64), config.epsilon_start, facts)

    def act(self, batch: Any, *, deterministic: bool = True) -> Any:
        """Actions for a batch of observations, as the environments take them."""
        values = self.values.numpy()[state_index(self.observation_space, batch)]
        actions = values.argmax(-1)
        if not deterministic:
            random = np.random.rand(len(actions)) < self.epsilon
            actions = np.where(random, np.random.randint(values.shape[-1], size=len(actions)), actions)
        return actions + self.start

    def predict(self, observation: Any, *, deterministic: bool = True) -> Any:
        """The action for one observation. Raises: InputError for one that is none of its space."""
        require_member(self.observation_space, observation)
        return self.act(batched(observation), deterministic=deterministic)[0]

    def save(self, directory: str | Path) -> None:
        """Write values and facts to a folder."""
        write_policy(directory, {"values": self.values}, {**self.facts, "epsilon": self.epsilon})

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what `save` wrote; of a run directory its `final/`. Raises: InputError when there is no such policy."""
        tensors, facts = read_policy(directory, KIND)
        return cls(tensors["values"], facts.pop("epsilon"), facts)
