"""Settings of A2C. Imports no torch, so that the command line answers at once."""

from pydantic import Field

from taurl.control.settings import ControlConfig, NetworkSettings
from taurl.runtime.config import DecayRate


class A2CConfig(NetworkSettings, ControlConfig):
    """Advantage actor-critic, the synchronous A3C (Mnih et al. 2016, arXiv:1602.01783).

    Each iteration acts for a few steps in every environment and takes one step of policy and critic together.
    """

    learning_rate: float = Field(7e-4, gt=0)
    """Peak learning rate of Adam."""
    adam_betas: tuple[DecayRate, DecayRate] = (0.0, 0.99)
    """Decay rates of Adam's moving averages of the gradient and of its square. Without the first it is the paper's
    RMSprop, bias corrected; with PyTorch's (0.9, 0.999) CartPole was learned, and often lost again."""
    adam_epsilon: float = Field(1e-5, gt=0)
    """Added to the root of Adam's second moment (PyTorch: 1e-8; Stable-Baselines3's RMSprop for A2C: 1e-5)."""
    max_grad_norm: float = Field(0.5, gt=0, allow_inf_nan=True)
    """The gradient is scaled down to this norm where it exceeds it."""
    rollout_steps: int = Field(5, ge=1)
    """Steps of each environment in one iteration, the n of the n-step returns."""
    trace_decay: float = Field(1.0, ge=0, le=1)
    """λ of GAE: 1 gives the paper's n-step returns, less trusts the value estimate more."""
    value_coefficient: float = Field(1.0, ge=0)
    """Weight of the value loss, half the squared error. (Stable-Baselines3 leaves out the half: its 0.5 is 1 here.)"""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus. (The paper: 0.01 on Atari; Stable-Baselines3: 0.)"""
    whiten_advantages: bool = False
    """Shift and scale the advantages of each rollout to mean 0 and deviation 1."""
