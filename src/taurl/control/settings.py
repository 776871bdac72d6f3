"""Settings that the algorithms of the wing share. Imports no torch."""

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from taurl.runtime.config import FREE, OptimizerSettings, RunConfig, Settings

Width = Annotated[int, Field(ge=1)]


class EnvironmentSettings(Settings):
    """Which environment; the last base of a config, so that its help begins with it."""

    env: str | None = None
    """A gymnasium id, for example CartPole-v1; my_module:MyEnv-v0 imports my_module first, which registers it."""
    env_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the environment, for example is_slippery=false."""
    environments: int = Field(8, ge=1)
    """Copies that are stepped together."""
    vectorization: Literal["auto", "sync", "async", "envpool"] = "auto"
    """From 4 copies on the environment's own vector class where it has one, else one after the other (auto); always one
    after the other (sync); each in a process of its own (async), for environments that take milliseconds a step; or by
    envpool, which has many environments in C++."""

    @field_validator("env_args")
    @classmethod
    def _are_plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: plain(value, name) for name, value in arguments.items()}


def plain(value: Any, name: str) -> Any:
    """A value as JSON and YAML give it back: the settings and the policy are written down and read again.

    A date, as which YAML reads 2020-01-01, is its text, and a tuple a list. Raises: ValueError where there is no such
    form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [plain(one, name) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(one, f"{name}.{key}") for key, one in value.items()}
    raise ValueError(
        f"{name} is of type {type(value).__name__}, expected a number, text, or a list or dictionary of these; from "
        "Python, a function can make the environment"
    )


class ControlConfig(RunConfig, EnvironmentSettings):
    """The settings that every algorithm of the wing has."""

    threads: int = Field(1, ge=1)
    """CPU threads. Networks this small lose more by waiting for a second one than it does for them."""
    steps: int = Field(100_000, ge=1, json_schema_extra=FREE)
    """Environment steps in all, over all copies; the run ends with the first iteration at or past them. A finished run
    may be resumed with more unless its schedule spreads over all of them."""
    save_every: int = Field(0, ge=0, json_schema_extra=FREE)
    """Environment steps between checkpoints; 0 saves at the end and when interrupted."""
    record_every: int = Field(2048, ge=1)
    """Environment steps between records of the metrics, rounded up to whole iterations."""
    discount: float = Field(0.99, ge=0, le=1)
    """γ: what a reward one step later counts."""

    eval_every: int = Field(0, ge=0, json_schema_extra=FREE)
    """Environment steps between evaluations; 0 evaluates at the end only."""
    eval_episodes: int = Field(20, ge=0, json_schema_extra=FREE)
    """Episodes of an evaluation, in environments of its own; 0 evaluates nothing."""
    stop_at: float | None = Field(None, json_schema_extra=FREE)
    """Stop when the mean return of an evaluation reaches this."""
    video: bool = Field(True, json_schema_extra=FREE)
    """Leave a short GIF of the trained policy for the report, where the environment can be drawn."""

    @model_validator(mode="after")
    def _stops_by_evaluations(self) -> Self:
        if self.stop_at is not None and not (self.eval_every and self.eval_episodes):
            raise ValueError(
                f"stop_at is {self.stop_at:g}, but nothing is evaluated along the way (eval_every {self.eval_every}, "
                f"eval_episodes {self.eval_episodes}): give eval_every"
            )
        return self


class AdamSettings(OptimizerSettings):
    """The optimiser of a small network (`updates.FlatAdam`)."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on all parameters."""


class NetworkSettings(AdamSettings):
    """The policy's network, and what it sees."""

    hidden: tuple[Width, ...] = (64, 64)
    """Widths of the hidden layers, of policy and value each."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Between the layers."""
    initial_log_std: float = 0.0
    """Logarithm of the standard deviation of actions in a box at first."""
    normalize_observations: bool = False
    """Shift and scale observations by their running mean and deviation, and clip them to ±10."""
    normalize_rewards: bool = False
    """Divide rewards by the running deviation of the discounted return, and clip them to ±10."""
