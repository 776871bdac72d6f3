"""Replay: the newest steps of all copies, drawn again and again to learn from."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taurl.control.environments import Array
from taurl.control.sum_tree import SumTree
from taurl.functional.replay import n_step_sums, proportional_priorities, replay_weights
from taurl.runtime.errors import InputError

NONE = -1  # in place of a step: none


class Batch(NamedTuple):
    """N steps that were drawn.

    observations: float [N, d], what was acted on.
    actions: int64 [N].
    rewards: float [N], of up to n steps, discounted.
    next_observations: float [N, d], what followed them, before any reset.
    terminated: bool [N], whether nothing follows that.
    discounts: float [N], what a value of `next_observations` counts: γ^n, or γ^m where only m < n steps are known.
    weights: float [N] of the losses; all 1 where every step is drawn alike.
    places: int64 [N], where they are.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    discounts: Tensor
    weights: Tensor
    places: Tensor


class Replay:
    """A ring of the newest steps, each drawn with the same probability.

    Each step knows the one that followed it in its episode, wherever that lies, so that returns of n steps are summed
    when it is drawn. Episode ends, and the newest step of a copy, have none that follows: the sum ends there, and the
    value of what was seen last comes in, unless the episode terminated.

    Args:
        capacity: steps that are kept.
        width: d of an observation.
        copies: B, of the environment.
    Attributes:
        size: steps there are.
        changes: counts what was added.
    Raises: InputError where there is not the memory for it.
    """

    def __init__(self, capacity: int, width: int, copies: int):
        self.capacity = capacity
        try:
            self.observations, self.next_observations = (
                np.zeros((capacity, width), dtype=np.float32) for _ in range(2)
            )
            self.actions = np.zeros(capacity, dtype=np.int64)
            self.rewards = np.zeros(capacity, dtype=np.float32)
            self.terminated = np.zeros(capacity, dtype=bool)
            self.following = np.full(capacity, NONE)
        except MemoryError as error:
            raise InputError(
                f"buffer_size is {capacity}: there is no memory for the {2 * 4 * capacity * width / 1e9:,.1f} GB that "
                f"so many pairs of observations of {width} numbers take; give a smaller buffer_size"
            ) from error
        self.newest = np.full(copies, NONE)  # of each copy, while its episode goes on
        self.position = self.size = 0
        self.changes = 0

    def add(
        self,
        copies: Array,
        observations: Array,
        actions: Array,
        rewards: Array,
        next_observations: Array,
        terminated: Array,
        truncated: Array,
    ) -> Array:
        """Keep steps over the oldest. Returns: where they are.

        Args:
            copies: of which copy each step is, [N], in the order of time; no more than the capacity.
        """
        places = (self.position + np.arange(len(copies))) % self.capacity
        self.observations[places] = observations
        self.next_observations[places] = next_observations
        self.actions[places] = actions
        self.rewards[places] = rewards
        self.terminated[places] = terminated
        self._link(copies, places, terminated | truncated)
        self.position = (self.position + len(copies)) % self.capacity
        self.size = min(self.size + len(copies), self.capacity)
        self.changes += 1
        return places

    def _link(self, copies: Array, places: Array, ended: Array) -> None:
        """Let each step know the one that follows it in its episode."""
        order = np.argsort(copies, kind="stable")  # one copy after the other
        copies, where, ended = copies[order], places[order], ended[order]
        first = np.diff(copies, prepend=NONE) != 0
        before = np.where(first, self.newest[copies], np.where(np.roll(ended, 1), NONE, np.roll(where, 1)))
        kept, added = ((before != NONE) & part for part in (first, ~first))
        self.following[before[kept]] = where[kept]
        self.following[places] = NONE  # only now: what was kept may have been overwritten by what is added
        self.following[before[added]] = where[added]
        last = np.roll(first, -1)
        self.newest[copies[last]] = np.where(ended[last], NONE, where[last])

    def cut(self) -> None:
        """The copies have begun anew: what is added next follows nothing."""
        self.newest[:] = NONE

    def draw(self, count: int, *, discount: float, steps: int) -> Batch:
        """So many steps, with replacement, from numpy's global generator.

        Args:
            discount: γ.
            steps: n of the returns.
        """
        return self.batch(np.random.randint(self.size, size=count), discount=discount, steps=steps)

    def batch(self, places: Array, *, discount: float, steps: int) -> Batch:
        """The steps at these places [N], with returns of n steps."""
        last, known = places, np.ones(len(places), dtype=np.int64)
        rewards = [self.rewards[places]]
        for _ in range(steps - 1):
            following = self.following[last]
            known += following != NONE
            last = np.where(following != NONE, following, last)
            rewards.append(self.rewards[last])
        sums, discounts = n_step_sums(torch.from_numpy(np.stack(rewards)), torch.from_numpy(known), discount=discount)
        return Batch(
            observations=torch.from_numpy(self.observations[places]),
            actions=torch.from_numpy(self.actions[places]),
            rewards=sums,
            next_observations=torch.from_numpy(self.next_observations[last]),
            terminated=torch.from_numpy(self.terminated[last]),
            discounts=discounts,
            weights=torch.ones(len(places)),
            places=torch.from_numpy(places),
        )

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        columns = {name: torch.from_numpy(getattr(self, name)[: self.size]) for name in self._columns()}
        return {**columns, "newest": torch.from_numpy(self.newest), "position": torch.tensor(self.position)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for name in self._columns():
            getattr(self, name)[: len(tensors[name])] = tensors[name].numpy()
        self.newest[:] = tensors["newest"].numpy()
        self.position, self.size = int(tensors["position"]), len(tensors["rewards"])

    def _columns(self) -> tuple[str, ...]:
        return ("observations", "next_observations", "actions", "rewards", "terminated", "following")


class PrioritizedReplay(Replay):
    """A ring where a step is drawn in proportion to p = (|TD error| + ε)^α; a new one has the largest p so far.

    As in the paper, a batch is drawn one step from each of as many equal shares of the whole.

    Args:
        exponent: α.
    Source: Schaul et al. 2016, arXiv:1511.05952, algorithm 1.
    """

    def __init__(self, capacity: int, width: int, copies: int, *, exponent: float):
        super().__init__(capacity, width, copies)
        self.exponent, self.largest = exponent, 1.0
        self.tree = SumTree(capacity)

    def add(
        self,
        copies: Array,
        observations: Array,
        actions: Array,
        rewards: Array,
        next_observations: Array,
        terminated: Array,
        truncated: Array,
    ) -> Array:
        places = super().add(copies, observations, actions, rewards, next_observations, terminated, truncated)
        self.tree.set(places, np.full(len(places), self.largest))
        return places

    def draw_weighted(self, count: int, *, discount: float, steps: int, weight_exponent: float) -> Batch:
        """As `draw`, in proportion to the priorities, with weights for β = `weight_exponent`."""
        total = self.tree.total
        places = self.tree.find((np.arange(count) + np.random.random(count)) * (total / count))
        probabilities = torch.from_numpy(self.tree.priorities[places] / total)
        weights = replay_weights(probabilities, size=self.size, exponent=weight_exponent)
        return self.batch(places, discount=discount, steps=steps)._replace(weights=weights.float())

    def set_errors(self, places: Array, errors: Tensor) -> None:
        """Give places the priorities that their TD errors [N] make."""
        priorities = proportional_priorities(errors, exponent=self.exponent).double().numpy()
        self.largest = max(self.largest, float(priorities.max()))
        self.tree.set(places, priorities)
        self.changes += 1

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        priorities = torch.from_numpy(self.tree.priorities[: self.size])
        return {**found, "priorities": priorities, "largest": torch.tensor(self.largest, dtype=torch.float64)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self.largest = float(tensors["largest"])
        self.tree.set(np.arange(self.size), tensors["priorities"].numpy())
