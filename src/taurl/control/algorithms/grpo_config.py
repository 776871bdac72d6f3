"""Settings of GRPO in environments. Imports no torch, so that the command line answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.control.settings import ControlConfig, NetworkSettings
from taurl.runtime.config import refuse_unread

# What each loss type in place of the clip does not read.
UNREAD = {"cispo": ("clip_low",), "sapo": ("clip_low", "clip_high"), "vespo": ("clip_low", "clip_high")}


class GRPOConfig(NetworkSettings, ControlConfig):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300), without a language model.

    Each iteration plays one episode in every copy of the environment, `group_size` of them from the same beginning,
    takes an episode's advantage from the returns of its group, and climbs the clipped surrogate. There is no critic.
    """

    environments: int = Field(64, ge=2)
    """Copies that are stepped together, and episodes in one iteration: a multiple of `group_size`."""
    vectorization: Literal["sync", "async"] = "sync"
    """One after the other (sync), or each in a process of its own (async), for environments that take milliseconds a
    step. (A vector class of the environment's own cannot begin some copies alike.)"""
    discount: float = Field(1.0, ge=0, le=1)
    """γ of an episode's return. (1 as in `taurl llm grpo`; the other algorithms here have 0.99.)"""

    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate of Adam."""
    adam_epsilon: float = Field(1e-5, gt=0)
    """Added to the root of Adam's second moment (PyTorch: 1e-8; the reference code of PPO: 1e-5)."""
    max_grad_norm: float = Field(0.5, gt=0, allow_inf_nan=True)
    """The gradient is scaled down to this norm where it exceeds it."""
    group_size: int = Field(8, ge=2)
    """Episodes that begin alike."""
    max_episode_steps: int = Field(1000, ge=1)
    """An episode that is longer is cut here, as by a time limit; dr_grpo divides by it."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide the centred returns by the standard deviation of the group, of the batch, or not at all (Dr. GRPO)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How an episode's advantage becomes a loss, by the names of `taurl llm grpo`, a step being a token: the mean over
    episodes of their steps' mean (grpo), the sum over steps divided by max_episode_steps (dr_grpo), the mean over all
    steps (dapo), and so on."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """Ratios below 1 − clip_low gain nothing more from a negative advantage."""
    clip_high: float | None = Field(None, ge=0)
    """Ratios above 1 + clip_high gain nothing more from a positive advantage. None: 0.2, and 4 for cispo, whose weights
    it caps."""
    mask_truncated: bool = False
    """Leave episodes that a time limit cut out of the loss; else their return is what they had got by then."""
    epochs: int = Field(4, ge=1)
    """Passes over an iteration's episodes."""
    minibatches: int = Field(4, ge=1)
    """Updates in a pass."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        refuse_unread(self, UNREAD.get(self.loss_type, ()), f"loss_type {self.loss_type} does not read it")
        if self.environments % self.group_size:
            raise ValueError(f"environments {self.environments} is not a multiple of group_size {self.group_size}")
        if self.minibatches > self.environments:
            raise ValueError(f"minibatches {self.minibatches} exceed the {self.environments} episodes (environments)")
        return self
