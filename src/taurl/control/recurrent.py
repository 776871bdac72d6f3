"""Policies with a memory: an LSTM between the hidden layers and the head of actor and critic, one each.

Acting goes step by step. In an update, everything between two resets is one sequence of one call: from the state that
the rollout began with, with the present weights, or from zero where an episode begins. The details are those of Huang
et al. 2022, "The 37 implementation details of proximal policy optimization", section on LSTMs.

A state is one tensor [2, B, H]: the LSTM's output and its cell.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taurl.control.dense import Dense, WithPullback, differentiated
from taurl.control.distributions import ActionDistribution, Array
from taurl.control.environments import Environments, Transition
from taurl.control.networks import with_free
from taurl.control.normalization import Normalizer
from taurl.control.rollouts import Collector, Rollout


class Sequences(NamedTuple):
    """T steps of B environments, in order.

    observations: float [T, B, d].
    starts: bool [T, B], whether an episode begins with this observation.
    actor_state, critic_state: [2, B, H], before the first step.
    """

    observations: Tensor
    starts: Tensor
    actor_state: Tensor
    critic_state: Tensor

    def of(self, environments: Tensor) -> "Sequences":
        """Those of some environments."""
        return Sequences(*(column[:, environments] for column in self))


class Remembering(nn.Module):
    """Hidden layers, an LSTM and a linear head.

    Args:
        inputs, outputs: numbers of an observation, and of what is made of it.
        hidden: widths of the layers before the LSTM.
        memory: H, its width.
        activation: between the layers.
        last_gain: scale of the head's weights.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: Sequence[int], memory: int, activation: str, *, last_gain: float
    ):
        super().__init__()
        widths = [inputs, *hidden]
        self.layers = Dense(widths, activation, last_gain=math.sqrt(2), activate_last=True)
        self.lstm = nn.LSTM(widths[-1], memory)
        for name, parameter in self.lstm.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter, 1.0)
        self.head = Dense([memory, outputs], activation, last_gain=last_gain)

    def step(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Observations [B, d] and state → outputs [B, outputs], and the state after them."""
        # A cell's own call: a third of the time that a sequence of one takes.
        output, cell = torch.lstm_cell(self.layers.forward(observations), tuple(state), *self.lstm.parameters())
        return self.head.forward(output), torch.stack([output, cell])

    def unroll(self, observations: Tensor, starts: Tensor, state: Tensor) -> Tensor:
        """Sequences [T, B, ..] and the state before them → outputs [T · B, outputs], as `step` would give them.

        What lies between two resets becomes a row of its own, and all rows go through the LSTM in one call.
        """
        steps, count = starts.shape
        begins = starts.clone()
        begins[0] = True
        begins = begins.T.flatten()  # one environment after the other
        first = begins.nonzero().squeeze(1)
        row = begins.cumsum(0) - 1
        place = torch.arange(steps * count) - first[row]
        features = self.layers.forward(observations).transpose(0, 1).flatten(0, 1)
        rows = features.new_zeros(int(place.max()) + 1, len(first), features.shape[-1])
        before = state.new_zeros(2, len(first), state.shape[-1])
        before[:, row[::steps]] = forgotten(state, starts[0])
        found, _ = self.lstm(rows.index_put((place, row), features), tuple(before.unsqueeze(1)))
        outputs = found[place, row].unflatten(0, (count, steps)).transpose(0, 1).flatten(0, 1)
        return self.head.forward(outputs)

    def no_state(self, count: int) -> Tensor:
        """The state of so many environments before anything was seen."""
        return torch.zeros(2, count, self.lstm.hidden_size)


class RecurrentActor(Remembering):
    """`networks.Actor` with a memory: sequences → parameters of the action distribution [T · B, width + free]."""

    def __init__(
        self, inputs: int, distribution: ActionDistribution, hidden: Sequence[int], memory: int, activation: str
    ):
        super().__init__(inputs, distribution.width, hidden, memory, activation, last_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(distribution.free)) if distribution.free else None

    def step(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = super().step(observations, state)
        return with_free(outputs, self.log_std), state

    def forward(self, sequences: Sequences) -> Tensor:
        outputs = self.unroll(sequences.observations, sequences.starts, sequences.actor_state)
        return with_free(outputs, self.log_std)

    def with_pullback(self) -> WithPullback:
        """Sequences → parameters and their pullback, by automatic differentiation."""
        return partial(differentiated, self)


class RecurrentCritic(Remembering):
    """`networks.Critic` with a memory: sequences → values [T · B]."""

    def __init__(self, inputs: int, hidden: Sequence[int], memory: int, activation: str):
        super().__init__(inputs, 1, hidden, memory, activation, last_gain=1.0)

    def step(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = super().step(observations, state)
        return outputs.squeeze(-1), state

    def forward(self, sequences: Sequences) -> Tensor:
        return self.unroll(sequences.observations, sequences.starts, sequences.critic_state).squeeze(-1)

    def with_pullback(self) -> WithPullback:
        """Sequences → values and their pullback, by automatic differentiation."""
        return partial(differentiated, self)


def forgotten(state: Tensor, starts: Tensor) -> Tensor:
    """The state, zero where an episode begins. Args: state [2, B, H]; starts, bool [B]."""
    return state.masked_fill(starts[:, None], 0.0)


@dataclass(kw_only=True)
class RecurrentRollout(Rollout):
    """A rollout with what its memories began with; see `Sequences`."""

    starts: Tensor
    actor_state: Tensor
    critic_state: Tensor

    def sequences(self) -> Sequences:
        return Sequences(self.observations, self.starts, self.actor_state, self.critic_state)


class _Walk:
    """An actor and a critic on their way through a rollout, as `Collector` calls an actor.

    Each list has an entry for each step: starts [B], outputs, and the states before and after it.
    """

    def __init__(self, collector: "RecurrentCollector", actor: RecurrentActor, critic: RecurrentCritic):
        self.collector, self.actor, self.critic = collector, actor, critic
        self.starts: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.values: list[Tensor] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.after: list[tuple[Tensor, Tensor]] = []

    def of_arrays(self) -> Callable[[Array], Array]:
        return self._step

    def _step(self, observations: Array) -> Array:
        """The parameters for the observations that come next, remembering them."""
        collector, seen = self.collector, torch.from_numpy(observations)
        starts, before = collector.present()
        parameters, collector.actor_state = self.actor.step(seen, before[0])
        values, collector.critic_state = self.critic.step(seen, before[1])
        self.starts.append(starts)
        self.parameters.append(parameters)
        self.values.append(values)
        self.before.append(before)
        self.after.append((collector.actor_state, collector.critic_state))
        return parameters.numpy()

    def __call__(self, observations: Tensor) -> Tensor:
        """The parameters of all steps [T, B, ..] again."""
        return torch.stack(self.parameters)


class RecurrentCollector(Collector):
    """A collector whose actor and critic remember, also from one rollout to the next: its state is the checkpoint's."""

    def __init__(
        self, environments: Environments, distribution: ActionDistribution, normalizer: Normalizer, memory: int
    ):
        super().__init__(environments, distribution, normalizer)
        self.actor_state, self.critic_state = torch.zeros(2, 2, environments.count, memory)
        self.changes = 0

    def collect(self, actor: Any, critic: Any, steps: int) -> RecurrentRollout:
        """Act for so many steps in every environment. Args: a `RecurrentActor` and a `RecurrentCritic`."""
        self.changes += 1
        self.walk = _Walk(self, actor, critic)
        rollout = super().collect(self.walk, critic, steps)
        actor_state, critic_state = self.walk.before[0]
        return RecurrentRollout(
            **vars(rollout), starts=torch.stack(self.walk.starts), actor_state=actor_state, critic_state=critic_state
        )

    def present(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Which copies begin an episode, and the states of actor and critic, zero for those."""
        starts = torch.from_numpy(self.environments.episode_starts)
        return starts, (forgotten(self.actor_state, starts), forgotten(self.critic_state, starts))

    def _values(self, critic: Any, observations: Tensor, given: list[Transition]) -> tuple[Tensor, Tensor]:
        """V of each observation acted on, and of what followed it, each after what was seen before it."""
        last, _ = critic.step(observations[-1], self.present()[1][1])
        values = torch.stack([*self.walk.values, last])
        next_values = values[1:].clone()
        steps, copies, ended = self._ended(given)
        if steps:
            before = torch.stack([critic_state for _, critic_state in self.walk.after], 1)[:, steps, copies]
            next_values[steps, copies] = critic.step(ended, before)[0]
        return values[:-1], next_values

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"actor": self.actor_state, "critic": self.critic_state}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.actor_state, self.critic_state = tensors["actor"], tensors["critic"]
