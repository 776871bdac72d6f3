"""Settings of the commands that use a model without training it. Imports no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.llm.settings import (
    ModelSettings,
    PromptSettings,
    RewardSettings,
    RowSettings,
    SamplerSettings,
    TemplateSettings,
)
from taurl.runtime.config import MachineSettings, OutPath


class InferenceConfig(SamplerSettings, TemplateSettings, MachineSettings, ModelSettings):
    """The settings that evaluating, generating and chatting share."""

    model: str = "smollm2-135m-instruct"
    """Local folder (runs/NAME/final), smollm2-135m-instruct, or a Hugging Face hub name."""
    temperature: float = Field(0.0, ge=0)
    """Of sampling; 0 takes the most likely token."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the most likely tokens that together reach this probability; 1: all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample among the tokens with at least this share of the most likely one's probability; 0: all."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of sampling."""

    @model_validator(mode="after")
    def _samples_where_it_chooses(self) -> Self:
        narrowed = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        narrowed["count"] = getattr(self, "count", 1) > 1
        if self.temperature == 0 and (names := [name for name, is_set in narrowed.items() if is_set]):
            raise ValueError(f"{', '.join(names)} is for sampling, and temperature is 0: give a temperature, such as 1")
        return self


class EvaluateConfig(RewardSettings, PromptSettings, InferenceConfig):
    """Score a model on a data set with reward functions, greedily unless a temperature is given."""

    dataset: str | None = None
    """reasoning-gym:TASK, a .jsonl, .json, .csv or .parquet file, or a hub name."""
    rows: int | None = Field(None, ge=1)
    """Score the first rows only."""
    out: OutPath | None = None
    """Write every answer with its rewards to this .jsonl file."""


class GenerateConfig(PromptSettings, InferenceConfig):
    """Complete prompts, greedily unless a temperature is given."""

    prompts: str | None = None
    """A .jsonl, .json, .csv or .parquet file with a column `prompt`, or what `dataset` is elsewhere."""
    out: OutPath | None = None
    """Answers, one JSON object a line: the row with its `completion`. Default: standard output."""
    count: int = Field(1, ge=1)
    """Completions of each prompt."""


class ChatConfig(InferenceConfig):
    """Talk to a model in the terminal; its answers stream. An empty line or end of input ends the talk."""

    temperature: float = Field(0.7, ge=0)
    """Of sampling; 0 takes the most likely token."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer."""


class InspectConfig(RowSettings, ModelSettings):
    """Show rows of a data set as the model sees them in training: targets bright, the rest dim, each special token
    by its name. Rows with `chosen` and `rejected` are shown as both; of prompts alone, nothing is a target."""

    model: str = "smollm2-135m-instruct"
    """Local folder (runs/NAME/final), smollm2-135m-instruct, or a Hugging Face hub name."""
    dataset: str | None = None
    """reasoning-gym:TASK, a .jsonl, .json, .csv or .parquet file, or a hub name."""
    rows: int = Field(3, ge=1)
    """How many rows are shown, the first ones."""


class ScoreConfig(MachineSettings, ModelSettings):
    """Score completions with a reward model. Rows have a `prompt` and a `completion`, or `chosen` and `rejected`, or a
    list of `completions`; they come back with `score`, with `score_chosen` and `score_rejected`, or with `scores`."""

    model: str | None = None
    """Folder of a reward model (runs/NAME/final), or a Hugging Face hub name."""
    dataset: str | None = None
    """A .jsonl, .json, .csv or .parquet file, or a hub name."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, for example question=prompt."""
    out: OutPath | None = None
    """Rows with their scores, one JSON object a line. Default: standard output."""
    prompt_format: Literal["auto", "chat", "text"] | None = None
    """What a string prompt becomes: as in the model's training (its folder says, else auto), a user's message where
    there is a chat template (auto), always (chat), or raw text (text, for models that were trained so elsewhere)."""
    system_prompt: str | None = None
    """Put before prompts that have no system message; by default what the model's folder says."""
    normalize: bool = False
    """Subtract the mean of the model's scores on its training rows, and divide by their deviation."""
    best: bool = False
    """Keep of each prompt's rows the one with the highest score (best of N)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations: float32 on a CPU (auto), so that equal completions have equal scores in any batch."""
    tokens_per_part: int = Field(8192, ge=1)
    """Tokens, padding included, that go through the model together."""
