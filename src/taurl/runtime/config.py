"""Configurations: pydantic models that YAML files, command lines and Python share. Imports no torch."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from taurl.runtime.errors import InputError, reason
from taurl.runtime.other_names import names_here

# Marks a setting that may change when a run is resumed: it alters nothing that the run has already computed.
FREE: JsonDict = {"free_on_resume": True}

Config = TypeVar("Config", bound=BaseModel)
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A group of settings: unknown names are refused, and a field's docstring is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _are_known(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"unknown setting {name}{did_you_mean(str(name), cls.model_fields)}")
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any, info: ValidationInfo) -> Any:
        """One word or number where several may stand, as YAML and Python have it."""
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = [part for part in get_args(kind) if part is not NoneType] if NoneType in get_args(kind) else [kind]
        several = len(kinds) == 1 and get_args(kinds[0])[-1:] == (Ellipsis,)
        return (value,) if several and isinstance(value, str | int | float) and value != "" else value


class ThreadSettings(Settings):
    """How much of the processor is used."""

    threads: int | None = Field(None, ge=1)
    """CPU threads; default: OMP_NUM_THREADS where that is set, else the cores this process may use."""


class MachineSettings(ThreadSettings):
    """What a model runs on."""

    device: str = "auto"
    """Where the model lives: cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations (in training, masters and optimiser stay float32); auto measures which matrix
    product is faster here, once."""


def from_home(path: object) -> object:
    """A path with `~` as the shell would have it: YAML and Python do not read it."""
    try:
        return Path(path).expanduser() if isinstance(path, str | Path) else path
    except RuntimeError:  # there is no such person
        return path


OutPath = Annotated[Path, BeforeValidator(from_home)]


class RunConfig(ThreadSettings):
    """The settings that every training run has."""

    out: OutPath | None = Field(None, json_schema_extra=FREE)
    """Run directory; must not exist yet. Default: runs/ALGORITHM-DATE-TIME."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random is drawn from this number: first weights, order of the data, sampling, environments."""
    steps: int = Field(100, ge=1, json_schema_extra=FREE)
    """Optimisation steps in all; a finished run may be resumed with more if its schedule is constant."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to the 0 that a step after the last would have."""

    save_every: int = Field(50, ge=0, json_schema_extra=FREE)
    """Steps between checkpoints; 0 saves at the end and when interrupted."""
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=FREE)
    """How many of the newest checkpoints stay."""

    @property
    def spread_over_steps(self) -> str | None:
        """What depends on the number of steps from the first one on, so that it cannot be changed; None: nothing."""
        return None if self.schedule == "constant" else f"schedule {self.schedule}"

    def to_yaml(self) -> str:
        """The settings as YAML that `read_yaml` and `validated` take back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def changed_from(self, other: Self) -> list[str]:
        """The names of the settings that differ."""
        # As they are written down: a tuple within a dictionary comes back from YAML as a list.
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return [name for name in mine if mine[name] != theirs[name]]


class OptimizerSettings(Settings):
    """AdamW, and what it does with a gradient."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    adam_betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Decay rates of AdamW's moving averages of the gradient and of its square."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of Adam's second moment."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """The gradient is scaled down to this norm where it exceeds it."""
    stop_after_non_finite: int = Field(3, ge=1, json_schema_extra=FREE)
    """An update whose loss or gradient is not finite is not taken; this many in a row stop the run."""


class TrainingConfig(OptimizerSettings, RunConfig, MachineSettings):
    """The settings of a run that trains a model of any size, on whatever device."""

    optimizer_states: Literal["float32", "eight_bit"] = "float32"
    """AdamW's moving averages: float32 (8 bytes a weight), or eight_bit (2 bytes, by bitsandbytes; slower on a CPU)."""


class SettingsLoader(yaml.SafeLoader):
    """Safe YAML that refuses a setting which is there twice, of which the last one would win unseen."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file; InputError in one line if it is missing, not YAML, or no mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), SettingsLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the settings: {reason(error)}") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: 2026-02-30, which looks like a date
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:  # an empty file, or comments only
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `setting: value` lines, found {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


def validated(config: type[Config], values: dict[str, Any], *, source: str) -> Config:
    """The config with these values; an InputError names source, setting, what was found and what was expected."""
    try:
        return config(**values)
    except ValidationError as error:
        raise InputError(f"{source}: {describe(error)}") from error


def read_config(directory: Path, config: type[Config]) -> Config:
    """The settings of the run in this directory; InputError if it is none."""
    path = directory / "config.yaml"
    if not path.exists():
        raise InputError(f"{directory}: not a run directory: config.yaml is missing")
    if not path.stat().st_size:
        raise InputError(f"{path}: empty, as after a power cut: write the run's settings into it again")
    return validated(config, read_yaml(path), source=str(path))


def free_on_resume(config: type[BaseModel], name: str) -> bool:
    """Whether a setting may change when a run is resumed."""
    extra = config.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("free_on_resume"))


def why_not_on_resume(config: type[BaseModel], name: str) -> str:
    """Why a setting may not change then, and what to do."""
    extra = config.model_fields[name].json_schema_extra
    found = extra.get("on_resume") if isinstance(extra, dict) else None
    return str(found or "it would alter steps already taken; start a new run for that")


def describe(error: ValidationError) -> str:
    """The first problem of a validation error, in one line."""
    problem = error.errors(include_url=False)[0]
    name, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    # Settings that do not fit together, or one that is missing: the input is then all of them.
    if isinstance(problem["input"], dict) and (not name or problem["type"] == "missing"):
        return f"{name}: {message}" if name else message
    return f"{name} is {problem['input']!r}: {message}"


def refuse_unread(config: BaseModel, names: Iterable[str], why: str) -> None:
    """Raises: InputError for the first of these settings that is not at its default, since nothing would read it."""
    for name in names:
        default = type(config).model_fields[name].get_default(call_default_factory=True)
        if (value := getattr(config, name)) != default:
            raise InputError(f"{name} is {value!r}, but {why}: leave it out, or at its default, {default!r}")


def did_you_mean(name: str, known: Any) -> str:
    """`; did you mean X?`: what another library calls so, or a close name; else the known names."""
    if here := names_here(name, known):
        return f"; did you mean {' and '.join(here)}?"
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
