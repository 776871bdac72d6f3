"""A trained policy: acts on observations, and is saved and loaded without its trainer."""

from pathlib import Path
from typing import Any, Self

import gymnasium
import numpy as np
import torch
from torch import Tensor

from taurl.control.action_masks import rows
from taurl.control.dense import of_arrays
from taurl.control.distributions import FORBIDDEN, ActionDistribution, Array, Bernoulli, Gaussian, distribution_for
from taurl.control.environments import batched, bounds
from taurl.control.networks import Actor, Critic, Seeing, actor_for, critic_for
from taurl.control.normalization import Normalizer
from taurl.control.policy_files import facts_of, read_policy, write_policy
from taurl.control.recurrent import RecurrentActor, forgotten
from taurl.control.spaces import encode, has_images, is_image, leaves, require_member, space_of, width
from taurl.runtime.config import refuse_unread
from taurl.runtime.errors import InputError


class Policy:
    """An actor with the spaces it acts in and the normalisation it was trained with, which no longer changes.

    One with a memory carries it from one call to the next.

    Attributes:
        remembers: whether what it does depends on what it saw before; it is then told where episodes begin.
        masks_actions: whether it was trained to be told what is allowed.
    """

    def __init__(
        self,
        actor: Actor | Seeing,
        distribution: ActionDistribution,
        normalizer: Normalizer,
        facts: dict[str, Any],
    ):
        self.actor, self.distribution, self.normalizer, self.facts = actor, distribution, normalizer, facts
        self.observation_space = space_of(facts["observation_space"])
        self.width = width(self.observation_space)
        self.remembers = bool(facts.get("memory"))
        self.masks_actions = bool(facts.get("mask_actions"))
        self.state = torch.zeros(2, 0, 0)  # of no copy yet

    @classmethod
    def create(cls, environments: Any, config: Any, *, memory: int = 0, mask_actions: bool = False) -> Self:
        """A new one for these spaces, with the network that the settings describe.

        Args:
            memory: width of its LSTM, see `recurrent`; 0 for none.
            mask_actions: whether it is to be told what is allowed.
        """
        facts = facts_of(
            environments,
            config,
            hidden=list(config.hidden),
            activation=config.activation,
            normalize_observations=config.normalize_observations,
            memory=memory,
            mask_actions=mask_actions,
        )
        if has_images(environments.observation_space):
            if config.normalize_observations:
                raise InputError("normalize_observations is true, but images are scaled by their range; leave it out")
            if memory:
                raise InputError(f"memory is {memory}, which is for observations without images; stack frames instead")
            if all(map(is_image, leaves(environments.observation_space))):
                refuse_unread(config, ["hidden", "activation"], "images alone go through convolutions to the outputs")
        if not isinstance(environments.action_space, gymnasium.spaces.Box):
            refuse_unread(config, ["initial_log_std"], f"action space {environments.action_space} is no box")
        policy = cls._of(facts)
        for name, parameter in policy.actor.named_parameters():
            if name.endswith("log_std"):
                parameter.data.fill_(config.initial_log_std)
        policy.normalizer = Normalizer(
            numbers(environments.observation_space),
            environments.count,
            observations=config.normalize_observations,
            rewards=config.normalize_rewards,
            discount=config.discount,
        )
        return policy

    @classmethod
    def _of(cls, facts: dict[str, Any]) -> Self:
        distribution = distribution_for(space_of(facts["action_space"]))
        space, scales = space_of(facts["observation_space"]), facts["normalize_observations"]
        normalizer = Normalizer(numbers(space), 1, observations=scales, rewards=False, discount=1.0)
        return cls(actor_of(facts, distribution), distribution, normalizer, facts)

    def new_critic(self) -> Critic | Seeing:
        """A critic without memory for what this policy sees; convolutions are common to it and the actor."""
        return critic_for(self.observation_space, self.actor, self.facts["hidden"], self.facts["activation"])

    @torch.inference_mode()
    def act(
        self, batch: Any, *, deterministic: bool = True, episode_starts: Any = None, action_masks: Any = None
    ) -> Any:
        """Actions for a batch of observations, as the environments take them.

        Args:
            episode_starts: bool [B], where what was seen before is to be forgotten; None where nothing is.
            action_masks: bool [B, n], the actions that are allowed; None if the policy was not trained with any.
        Raises: InputError for a policy trained with masks that is given none.
        """
        observed = self.normalizer.apply(encode(self.observation_space, batch))
        if self.remembers:
            parameters = self._after_all(observed, episode_starts)
        else:
            parameters = of_arrays(self.actor)(observed.numpy())
        if action_masks is not None or self.masks_actions:
            parameters = np.where(self._allowed(action_masks, parameters), parameters, FORBIDDEN)
        distribution = self.distribution
        actions = distribution.mode(parameters) if deterministic else distribution.sample(parameters)
        return distribution.to_environment(actions)

    def _after_all(self, observed: Tensor, episode_starts: Any) -> Array:
        """The parameters after this and what was seen in earlier calls, where no episode has begun since."""
        actor: Any = self.actor
        if self.state.shape[1] != len(observed):  # other copies than before
            self.state = actor.no_state(len(observed))
        elif episode_starts is not None:
            self.state = forgotten(self.state, torch.from_numpy(episode_starts))
        parameters, self.state = actor.step(observed, self.state)
        found: Array = parameters.numpy()
        return found

    def _allowed(self, action_masks: Any, parameters: Array) -> Array:
        if action_masks is None:
            raise InputError("the policy was trained with action masks, but is given none: pass the action mask")
        found = rows(action_masks)
        if found.shape != parameters.shape or isinstance(self.distribution, Gaussian | Bernoulli):
            raise InputError(
                f"an action mask has {found.shape[1]} entries, which do not fit the action space "
                f"{space_of(self.facts['action_space'])}"
            )
        return found

    def predict(
        self, observation: Any, *, deterministic: bool = True, episode_start: bool = False, action_mask: Any = None
    ) -> Any:
        """The action for one observation: the most likely one, or one drawn. Actions of a box are clipped to it.

        Args:
            episode_start: whether an episode begins here, for a policy with a memory.
            action_mask: bool [n], what is allowed, for a policy trained with masks.
        Raises: InputError for an observation that is none of its space.
        """
        require_member(self.observation_space, observation)
        action = self.act(
            batched(observation),
            deterministic=deterministic,
            episode_starts=np.array([episode_start]),
            action_masks=None if action_mask is None else [action_mask],
        )[0]
        box = bounds(space_of(self.facts["action_space"]))
        return action if box is None else np.clip(action, *box)

    def save(self, directory: str | Path) -> None:
        """Write weights, normalisation and facts to a folder."""
        tensors = {f"actor/{name}": tensor for name, tensor in self.actor.state_dict().items()}
        tensors |= {f"normalizer/{name}": tensor for name, tensor in self.normalizer.tensors().items()}
        write_policy(directory, tensors, self.facts)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what `save` wrote; of a run directory its `final/`. Raises: InputError when there is no policy."""
        tensors, facts = read_policy(directory, None)
        policy = cls._of(facts)
        policy.actor.load_state_dict(_under("actor/", tensors))
        policy.normalizer.load_tensors(_under("normalizer/", tensors))
        return policy


def actor_of(facts: dict[str, Any], distribution: ActionDistribution) -> Any:
    """The network that the facts of a policy describe."""
    space, hidden, activation = space_of(facts["observation_space"]), facts["hidden"], facts["activation"]
    if memory := facts.get("memory"):
        return RecurrentActor(width(space), distribution, hidden, memory, activation)
    return actor_for(space, distribution, hidden, activation)


def numbers(space: gymnasium.Space[Any]) -> int:
    """How many numbers of an observation are normalised; of those with images none is."""
    return 0 if has_images(space) else width(space)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
