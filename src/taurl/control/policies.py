"""A trained policy: acts on observations, and is saved and loaded without its trainer."""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from taurl.control.dense import of_arrays
from taurl.control.distributions import ActionDistribution, distribution_for
from taurl.control.environments import batched, bounds
from taurl.control.networks import Actor
from taurl.control.normalization import Normalizer
from taurl.control.spaces import described, encode, space_of, width
from taurl.runtime.errors import InputError

WEIGHTS, FACTS = "policy.safetensors", "policy.json"


class Policy:
    """An actor with the spaces it acts in and the normalisation it was trained with, which no longer changes."""

    def __init__(self, actor: Actor, distribution: ActionDistribution, normalizer: Normalizer, facts: dict[str, Any]):
        self.actor, self.distribution, self.normalizer, self.facts = actor, distribution, normalizer, facts
        self.observation_space = space_of(facts["observation_space"])
        self.width = width(self.observation_space)

    @classmethod
    def create(cls, environments: Any, config: Any) -> Self:
        """A new one for these spaces, with the network that the settings describe."""
        facts = {
            "env": config.env,
            "env_args": config.env_args,
            "observation_space": described(environments.observation_space),
            "action_space": described(environments.action_space),
            "hidden": list(config.hidden),
            "activation": config.activation,
            "normalize_observations": config.normalize_observations,
        }
        policy = cls._of(facts)
        if policy.actor.log_std is not None:
            policy.actor.log_std.data.fill_(config.initial_log_std)
        policy.normalizer = Normalizer(
            width(environments.observation_space),
            environments.count,
            observations=config.normalize_observations,
            rewards=config.normalize_rewards,
            discount=config.discount,
        )
        return policy

    @classmethod
    def _of(cls, facts: dict[str, Any]) -> Self:
        distribution = distribution_for(space_of(facts["action_space"]))
        size = width(space_of(facts["observation_space"]))
        actor = Actor(size, distribution, facts["hidden"], facts["activation"])
        scales = facts["normalize_observations"]
        return cls(actor, distribution, Normalizer(size, 1, observations=scales, rewards=False, discount=1.0), facts)

    @torch.inference_mode()
    def act(self, batch: Any, *, deterministic: bool = True) -> Any:
        """Actions for a batch of observations, as the environments take them."""
        observed = self.normalizer.apply(encode(self.observation_space, batch))
        parameters, distribution = of_arrays(self.actor)(observed.numpy()), self.distribution
        actions = distribution.mode(parameters) if deterministic else distribution.sample(parameters)
        return distribution.to_environment(actions)

    def predict(self, observation: Any, *, deterministic: bool = True) -> Any:
        """The action for one observation: the most likely one, or one drawn. Actions of a box are clipped to it."""
        action = self.act(batched(observation), deterministic=deterministic)[0]
        box = bounds(space_of(self.facts["action_space"]))
        return action if box is None else np.clip(action, *box)

    def save(self, directory: str | Path) -> None:
        """Write weights, normalisation and facts to a folder."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"actor/{name}": tensor.contiguous() for name, tensor in self.actor.state_dict().items()}
        tensors |= {f"normalizer/{name}": tensor for name, tensor in self.normalizer.tensors().items()}
        save_file(tensors, directory / WEIGHTS)
        (directory / FACTS).write_text(json.dumps(self.facts, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what `save` wrote; of a run directory its `final/`. Raises: InputError when there is no policy."""
        directory = policy_folder(directory)
        policy = cls._of(json.loads((directory / FACTS).read_text(encoding="utf-8")))
        tensors = load_file(directory / WEIGHTS)
        policy.actor.load_state_dict(_under("actor/", tensors))
        policy.normalizer.load_tensors(_under("normalizer/", tensors))
        return policy


def policy_folder(directory: str | Path) -> Path:
    """The folder that a policy was saved to: this one, or `final/` of a run. Raises: InputError when there is none."""
    directory = Path(directory)
    for folder in (directory, directory / "final"):
        if (folder / FACTS).exists():
            return folder
    raise InputError(f"{directory}: no policy here: {FACTS} is missing (a run writes it to final/ at its end)")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
