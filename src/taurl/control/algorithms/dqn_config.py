"""Settings of DQN. Imports no torch, so that the command line answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.control.settings import AdamSettings, ControlConfig, Width
from taurl.runtime.config import refuse_unread


class DQNConfig(AdamSettings, ControlConfig):
    """Deep Q-learning (Mnih et al. 2015, Nature 518).

    Acts ε-greedily, keeps the newest steps, and moves Q(s, a) of steps drawn from them towards targets of a copy of the
    network that follows it now and then. The defaults are those of Stable-Baselines3, which are the paper's for Atari
    with a small network, except that eight copies of the environment are stepped together and so the updates come in
    groups, two for each eight steps instead of one for each four.
    """

    hidden: tuple[Width, ...] = Field((64, 64), min_length=1)
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu"] = "relu"
    """Between the layers."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of Adam (the paper: RMSProp)."""
    max_grad_norm: float = Field(10.0, gt=0, allow_inf_nan=True)
    """The gradient is scaled down to this norm where it exceeds it."""
    batch_size: int = Field(32, ge=1)
    """Steps in one update."""
    buffer_size: int = Field(1_000_000, ge=1)
    """How many of the newest steps are kept."""
    learning_starts: int = Field(100, ge=0)
    """Environment steps at random before the first update (the paper: 50,000)."""
    train_every: int = Field(8, ge=1)
    """Environment steps, over all copies, between updates; a multiple of environments."""
    gradient_steps: int = Field(2, ge=1)
    """Updates each time."""
    target_every: int = Field(10_000, ge=1)
    """Environment steps between moves of the target network."""
    target_share: float = Field(1.0, gt=0, le=1)
    """τ: how far the target network moves towards the network each time; 1 copies it."""

    epsilon_start: float = Field(1.0, ge=0, le=1)
    """Probability of an action at random in the beginning."""
    epsilon_end: float = Field(0.05, ge=0, le=1)
    """Probability of an action at random in the end."""
    epsilon_fraction: float = Field(0.1, ge=0, le=1)
    """Share of all steps over which ε goes from start to end, linearly."""

    double: bool = False
    """Let the network choose the best next action and the target network judge it (van Hasselt et al. 2016)."""
    dueling: bool = False
    """Values and advantages from streams of their own (Wang et al. 2016)."""
    n_step: int = Field(1, ge=1)
    """Rewards in a target before the value comes in. Above 1 they are those of the policy that acted then."""
    prioritized: bool = False
    """Draw steps in proportion to their last TD errors (Schaul et al. 2016)."""
    priority_exponent: float = Field(0.6, ge=0)
    """α: 0 draws uniformly, 1 in proportion to the errors; with `prioritized`."""
    weight_exponent: float = Field(0.4, ge=0, le=1)
    """β of the weights that undo the preference, in the beginning; it goes linearly to 1; with `prioritized`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.train_every % self.environments:
            raise ValueError(
                f"train_every is {self.train_every}, expected a multiple of the {self.environments} environments"
            )
        if not self.prioritized:
            refuse_unread(self, ("priority_exponent", "weight_exponent"), "steps are drawn uniformly (see prioritized)")
        least = max(self.batch_size, self.train_every, 2 * self.environments)
        if self.buffer_size < least:
            raise ValueError(
                f"buffer_size is {self.buffer_size}, expected at least {least}: as many steps as a batch, as "
                "train_every, and two of each copy"
            )
        return self
