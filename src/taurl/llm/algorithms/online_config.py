"""Settings of algorithms that sample from the policy and learn from the rewards. Imports no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.llm.settings import (
    DataSettings,
    EvaluationSettings,
    LoraSettings,
    PartSettings,
    PromptSettings,
    RewardSettings,
    SamplerSettings,
)
from taurl.runtime.config import FREE, TrainingConfig, refuse_unread


class SampledConfig(
    PartSettings,
    LoraSettings,
    SamplerSettings,
    RewardSettings,
    EvaluationSettings,
    PromptSettings,
    TrainingConfig,
    DataSettings,
):
    """What a step samples."""

    prompts_per_step: int = Field(16, ge=1)
    """Prompts in one step."""
    group_size: int = Field(8, ge=1)
    """Completions of each prompt."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling and of the trained distribution alike. (Top-k, top-p and min-p are refused in training: the sampled
    distribution would not be the trained one.)"""
    samples_per_step: int = Field(8, ge=0, json_schema_extra=FREE)
    """Completions of each step that are kept in samples.jsonl."""


class OnlineConfig(SampledConfig):
    """How often a step's samples are learned from, by GRPO and PPO."""

    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    """What the ratio of a step's later updates is taken to: the log-probabilities under the weights before the first
    update, which with several minibatches take one more forward pass of all but the first; or those that the sampler
    gave, which take none. With these the ratio is 1 at first only as far as sampler and trainer agree, and
    importance_cap has nothing to correct."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Bound of the weights that correct for sampler and trainer disagreeing; None switches the correction off."""
    importance_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """One such weight a token, or one for the whole sequence; above the cap it is cut to it, or counts as 0 (TRL's
    vllm_importance_sampling_mode)."""
    minibatches: int = Field(1, ge=1)
    """Optimiser updates a pass over the step's completions."""
    epochs: int = Field(1, ge=1)
    """Passes over the step's completions."""

    @model_validator(mode="after")
    def _one_step_fits_together(self) -> Self:
        if self.minibatches > self.prompts_per_step:
            raise ValueError(f"minibatches {self.minibatches} exceed prompts_per_step {self.prompts_per_step}")
        if self.importance_cap is None:
            refuse_unread(self, ["importance_mode"], "without an importance_cap nothing is corrected")
        return self
