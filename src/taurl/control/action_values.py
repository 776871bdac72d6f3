"""Networks of action values, the greedy policy that one makes, and the copy that gives its targets."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from taurl.control.dense import Dense, Pullback, WithPullback, of_arrays
from taurl.control.environments import Array, Environments, batched
from taurl.control.policy_files import facts_of, read_policy, write_policy
from taurl.control.spaces import encode, require_member, space_of, width
from taurl.functional.values import dueling_action_values
from taurl.runtime.errors import InputError

KIND = "action-values"


class QNetwork(nn.Module):
    """Observations [.., d] → action values [.., A]."""

    def __init__(self, inputs: int, actions: int, hidden: Sequence[int], activation: str):
        super().__init__()
        self.layers = Dense([inputs, *hidden, actions], activation, last_gain=1.0)

    def forward(self, observations: Tensor) -> Tensor:
        found: Tensor = self.layers(observations)
        return found

    def of_arrays(self) -> Callable[[Array], Array]:
        """The same as a function of arrays; see `dense`."""
        return self.layers.of_arrays()

    def with_pullback(self) -> WithPullback:
        """Observations [N, d] → action values [N, A] and their pullback; see `dense`."""
        return self.layers.with_pullback(to_inputs=False)


class DuelingNetwork(nn.Module):
    """The same from two streams, one for the state and one for its actions, each with a hidden layer of its own.

    All hidden layers but the last are common.

    Source: Wang et al. 2016, arXiv:1511.06581.
    """

    def __init__(self, inputs: int, actions: int, hidden: Sequence[int], activation: str):
        super().__init__()
        *common, own = hidden
        before = common[-1] if common else inputs
        self.trunk = Dense([inputs, *common], activation, last_gain=2**0.5, activate_last=True)
        self.value = Dense([before, own, 1], activation, last_gain=1.0)
        self.advantages = Dense([before, own, actions], activation, last_gain=1.0)

    def forward(self, observations: Tensor) -> Tensor:
        features = self.trunk(observations)
        return dueling_action_values(self.value(features).squeeze(-1), self.advantages(features))

    def with_pullback(self) -> WithPullback:
        """Observations [N, d] → action values [N, A] and their pullback; see `dense`."""
        see = self.trunk.with_pullback(to_inputs=False)
        value, advantage = self.value.with_pullback(), self.advantages.with_pullback()

        def run(observations: Array) -> tuple[Array, Pullback]:
            features, to_observations = see(observations)
            (values, value_back), (advantages, advantages_back) = value(features), advantage(features)

            def pullback(gradient: Array) -> Array:
                # Of Q = V + A − mean A: V gets the sum over the actions, A what is left of each without their mean.
                of_value, of_advantages = gradient.sum(1, keepdims=True), gradient - gradient.mean(1, keepdims=True)
                return to_observations(value_back(of_value) + advantages_back(of_advantages))

            found = dueling_action_values(torch.from_numpy(values[:, 0]), torch.from_numpy(advantages))
            return found.numpy(), pullback

        return run


class TargetNetwork:
    """A copy of a network that follows it from time to time.

    Attributes:
        changes: counts how often it has moved.
    """

    def __init__(self, network: nn.Module):
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.changes = 0

    @torch.no_grad()
    def move(self, network: nn.Module, share: float) -> None:
        """θ' ← θ' + share · (θ − θ'); 1 copies."""
        for mine, other in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(other, share)
        self.changes += 1

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return self.network.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.network.load_state_dict(tensors)


class ValuePolicy:
    """Takes the action of the largest value; sampled, it is ε-greedy with the ε it was saved with.

    Attributes:
        network: of the action values.
        epsilon: of the sampled policy.
        facts: `env`, `env_args`, the spaces and the network's settings.
    """

    def __init__(self, facts: dict[str, Any], epsilon: float):
        self.facts, self.epsilon = facts, epsilon
        self.observation_space, actions = space_of(facts["observation_space"]), space_of(facts["action_space"])
        assert isinstance(actions, spaces.Discrete)
        self.width, self.actions, self.start = width(self.observation_space), int(actions.n), int(actions.start)
        kind = DuelingNetwork if facts["dueling"] else QNetwork
        self.network = kind(self.width, self.actions, facts["hidden"], facts["activation"])

    @classmethod
    def create(cls, environments: Environments, config: Any) -> Self:
        """A new one for these spaces. Raises: InputError where the actions are not one choice."""
        if not isinstance(environments.action_space, spaces.Discrete):
            raise InputError(
                f"action space {environments.action_space} is not Discrete, which action values need; take ppo or trpo"
            )
        own = {"hidden": list(config.hidden), "activation": config.activation, "dueling": config.dueling}
        facts = facts_of(environments, config, kind=KIND, **own)
        return cls(facts, config.epsilon_start)

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Array:
        """The best action of each encoded observation [B, d], counted from 0, int64 [B]; the first of equal ones."""
        best: Array = of_arrays(self.network)(observations.numpy()).argmax(-1)
        return best

    def act(self, batch: Any, *, deterministic: bool = True) -> Any:
        """Actions for a batch of observations, as the environments take them."""
        actions = self.greedy(encode(self.observation_space, batch))
        if not deterministic:
            explores = np.random.random(len(actions)) < self.epsilon
            actions = np.where(explores, np.random.randint(self.actions, size=len(actions)), actions)
        return actions + self.start

    def predict(self, observation: Any, *, deterministic: bool = True) -> Any:
        """The action for one observation. Raises: InputError for one that is none of its space."""
        require_member(self.observation_space, observation)
        return self.act(batched(observation), deterministic=deterministic)[0]

    def save(self, directory: str | Path) -> None:
        """Write weights and facts to a folder."""
        write_policy(directory, self.network.state_dict(), {**self.facts, "epsilon": self.epsilon})

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what `save` wrote; of a run directory its `final/`. Raises: InputError when there is no such policy."""
        tensors, facts = read_policy(directory, KIND)
        policy = cls(facts, facts.pop("epsilon"))
        policy.network.load_state_dict(tensors)
        return policy
