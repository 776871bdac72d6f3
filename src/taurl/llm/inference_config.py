"""Settings of the commands that use a model without training it. Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class InferenceConfig(BaseModel):
    """The settings that evaluating, generating and chatting share."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = "smollm2-135m-instruct"
    """Local folder (runs/NAME/final), smollm2-135m-instruct, or a Hugging Face hub name."""
    max_tokens: int = Field(256, ge=1)
    """Longest completion."""
    temperature: float = Field(0.0, ge=0)
    """Of sampling; 0 takes the most likely token."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the most likely tokens that together reach this probability; 1: all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample among the tokens with at least this share of the most likely one's probability; 0: all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, beside the model's stop tokens."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message of its own."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """What a string prompt becomes: a user's message where the tokenizer has a chat template (auto), always (chat),
    or raw text (text)."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of sampling."""
    slots: int = Field(64, ge=1)
    """Sequences that are sampled together."""
    generator: Literal["slots", "transformers"] = "slots"
    """The slot sampler, or `model.generate` for models it does not know (slow)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto measures which matrix product is faster here."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; default: the cores this process may use."""


class DataConfig(InferenceConfig):
    """How rows are read."""

    dataset_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a reasoning-gym task, for example min_terms=2 max_terms=2."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, for example question=prompt."""
    answer_after: str | None = None
    """Keep of the column `answer` what follows this marker (#### in GSM8K)."""


class EvaluateConfig(DataConfig):
    """Score a model on a data set with reward functions, greedily unless a temperature is given."""

    dataset: str | None = None
    """reasoning-gym:TASK, a .jsonl, .json, .csv or .parquet file, or a hub name."""
    rows: int | None = Field(None, ge=1)
    """Score the first rows only."""
    rewards: tuple[str, ...] = ()
    """Reward functions: module:function, file.py:function, or the name of a shipped one."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward function."""
    reward_timeout: float | None = Field(None, gt=0)
    """Seconds one call of a reward function may take: async ones, and all of them with reward_process."""
    reward_process: bool = False
    """Run the synchronous reward functions in a process of their own, so that reward_timeout can stop them."""
    out: Path | None = None
    """Write every answer with its rewards to this .jsonl file."""


class GenerateConfig(DataConfig):
    """Complete prompts, greedily unless a temperature is given."""

    prompts: str | None = None
    """A .jsonl, .json, .csv or .parquet file with a column `prompt`, or what `dataset` is elsewhere."""
    out: Path | None = None
    """Answers, one JSON object a line: the row with its `completion`. Default: standard output."""
    count: int = Field(1, ge=1)
    """Completions of each prompt."""


class ChatConfig(InferenceConfig):
    """Talk to a model in the terminal; its answers stream. An empty line or end of input ends the talk."""

    temperature: float = Field(0.7, ge=0)
    """Of sampling; 0 takes the most likely token."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer."""
