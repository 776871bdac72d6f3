"""Settings of TRPO. Imports no torch, so that the command line answers at once."""

from pydantic import Field

from taurl.control.settings import ControlConfig, NetworkSettings


class TRPOConfig(NetworkSettings, ControlConfig):
    """Trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477).

    Each iteration acts for `rollout_steps` steps in every environment, estimates advantages by GAE, takes one natural
    gradient step of the policy as long as the divergence allows, and fits the critic apart. The defaults are those of
    sb3-contrib, with eight environments for one.
    """

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of Adam, for the critic; the policy's steps have the length that `max_kl` gives them."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """The critic's gradient is scaled down to this norm where it exceeds it (sb3-contrib: never)."""
    rollout_steps: int = Field(256, ge=1)
    """Steps of each environment in one iteration."""
    trace_decay: float = Field(0.95, ge=0, le=1)
    """λ of GAE: 0 trusts the value estimate, 1 the sampled return."""
    max_kl: float = Field(0.01, gt=0)
    """δ: the mean divergence of an iteration's policy from the next is at most this."""
    damping: float = Field(0.1, ge=0)
    """Added to the diagonal of the Fisher matrix."""
    conjugate_gradient_steps: int = Field(15, ge=1)
    """At most so many products with the Fisher matrix find the direction (the paper: 10)."""
    critic_epochs: int = Field(10, ge=1)
    """Passes of the critic over an iteration's steps."""
    minibatch_size: int = Field(128, ge=1)
    """Steps in one update of the critic; an epoch's last minibatch takes what is left, the only one all of an
    iteration's steps where these are fewer."""
