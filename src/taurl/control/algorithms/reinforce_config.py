"""Settings of REINFORCE. Imports no torch, so that the command line answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.control.settings import ControlConfig, NetworkSettings
from taurl.runtime.config import refuse_unread


class REINFORCEConfig(NetworkSettings, ControlConfig):
    """REINFORCE (Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning").

    Each iteration plays one whole episode in every environment, and climbs log π of each action in proportion to the
    discounted rewards that followed it, less a baseline. Environments that are done first wait for the last; their
    idle steps count among `steps`. A reward-to-go counts in full at whatever time it begins, without the factor γ^t
    that the gradient of the discounted return from the start would have, as is usual.
    """

    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate of Adam, for the policy. (The paper: plain gradient steps.)"""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """The gradient is scaled down to this norm where it exceeds it; sums over whole episodes mostly do, so that
    iterations count alike."""
    record_every: int = Field(8192, ge=1)
    """Environment steps between records of the metrics, rounded up to whole iterations."""
    baseline: Literal["none", "constant", "learned"] = "learned"
    """Taken off the reward-to-go: nothing; the moving mean of it in earlier iterations; or a critic's value of the
    state. Only the variance changes."""
    critic_learning_rate: float = Field(3e-3, gt=0)
    """Learning rate of Adam, for the critic of the learned baseline."""
    critic_updates: int = Field(10, ge=1)
    """Steps of the critic towards the returns in each iteration, all episodes at once."""
    count_truncated: bool = True
    """What becomes of episodes that a time limit cut, where no critic knows what would have followed: they count as if
    nothing had, or are left out. A critic bootstraps."""
    max_episode_steps: int = Field(10_000, ge=1)
    """An episode that is longer is cut here, as by a time limit: an early policy may walk in circles."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    updates: int = Field(1, ge=1)
    """Steps of the policy with the same episodes. From the second on an older policy has played them, and importance
    weights correct for it."""
    importance: Literal["per_decision", "trajectory"] = "per_decision"
    """The weights of later updates: each reward by the ratios of the decisions before it, or all by those of the whole
    episode. Both give the gradient in expectation, the first with less variance."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.baseline == "learned" and not self.count_truncated:
            raise ValueError("count_truncated is for baseline none or constant: a critic bootstraps truncated episodes")
        if self.updates == 1:
            refuse_unread(self, ("importance",), "updates is 1, so that there are no weights of later ones")
        if self.baseline != "learned":
            why = f"baseline is {self.baseline}, without a critic"
            refuse_unread(self, ("critic_learning_rate", "critic_updates"), why)
        return self
