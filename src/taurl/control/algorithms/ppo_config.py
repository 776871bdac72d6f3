"""Settings of PPO. Imports no torch, so that the command line answers at once."""

from typing import Self

from pydantic import Field, model_validator

from taurl.control.settings import ControlConfig, NetworkSettings


class PPOConfig(NetworkSettings, ControlConfig):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347).

    Each iteration acts for `rollout_steps` steps in every environment, estimates advantages by GAE, and climbs the
    clipped surrogate for some epochs of minibatches. The defaults are much as in the reference code for continuous
    control, without clipped values, annealing and normalisation.
    """

    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate of Adam."""
    adam_epsilon: float = Field(1e-5, gt=0)
    """Added to the root of Adam's second moment (PyTorch: 1e-8; the reference code of PPO: 1e-5)."""
    max_grad_norm: float = Field(0.5, gt=0, allow_inf_nan=True)
    """The gradient is scaled down to this norm where it exceeds it."""
    rollout_steps: int = Field(128, ge=1)
    """Steps of each environment in one iteration."""
    trace_decay: float = Field(0.95, ge=0, le=1)
    """λ of GAE: 0 trusts the value estimate, 1 the sampled return."""
    epochs: int = Field(10, ge=1)
    """Passes over an iteration's steps."""
    minibatch_size: int = Field(256, ge=2)
    """Steps in one update; an epoch's last minibatch takes what is left, the only one all of an iteration's steps where
    these are fewer."""
    clip: float = Field(0.2, gt=0)
    """ε: ratios outside 1 ± ε gain nothing more."""
    anneal_clip: bool = False
    """Let `clip` and `value_clip` fall linearly to 0, as the reference code for Atari does."""
    value_coefficient: float = Field(1.0, ge=0)
    """Weight of the value loss, half the squared error. (Stable-Baselines3 leaves out the half: its 0.5 is 1 here.)"""
    value_clip: float | None = Field(None, gt=0)
    """Clip the value's change too, as the reference code does; None: not, it does not help."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of each minibatch to mean 0 and deviation 1."""
    kl_penalty_target: float | None = Field(None, gt=0)
    """PPO's other form: no clip, but a price β on the divergence from the policy that acted, exact; after each
    iteration β is halved where the divergence is below this by a factor of 1.5, and doubled where it is above."""
    kl_coefficient: float = Field(1.0, gt=0)
    """β at first, with kl_penalty_target."""
    target_kl: float | None = Field(None, gt=0)
    """End an iteration's epochs when the divergence from the policy that acted exceeds 1.5 times this, as measured on
    an epoch's last minibatch before its update."""

    memory: int = Field(0, ge=0)
    """Width of an LSTM between the hidden layers and the outputs, of policy and value each, for environments that do
    not show all of their state; 0: none. Minibatches are then whole rollouts of some environments."""
    mask_actions: bool = False
    """Never take an action that the environment forbids, by info["action_mask"] or by a method action_masks()."""

    @property
    def spread_over_steps(self) -> str | None:
        annealed = self.anneal_clip and (self.kl_penalty_target is None or self.value_clip is not None)
        spread = [super().spread_over_steps, "anneal_clip" if annealed else None]
        return " and ".join(filter(None, spread)) or None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.memory and self.minibatch_size % self.rollout_steps:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} is no multiple of rollout_steps {self.rollout_steps}; with "
                "memory, minibatches are whole rollouts of some environments"
            )
        if "kl_coefficient" in self.model_fields_set and self.kl_coefficient != 1 and self.kl_penalty_target is None:
            raise ValueError(
                f"kl_coefficient is {self.kl_coefficient:g}, the first price under kl_penalty_target: give that too"
            )
        return self
