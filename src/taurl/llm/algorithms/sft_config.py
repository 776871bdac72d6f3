"""Settings of SFT. Imports no torch, so that the command line answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.llm.settings import (
    DataSettings,
    EpochSettings,
    EvaluationSettings,
    LoraSettings,
    PartSettings,
    RewardSettings,
    RowSettings,
    SamplerSettings,
)
from taurl.runtime.config import FREE, TrainingConfig, refuse_unread

REWARDS_SCORE_ANSWERS = "rewards score answers to held-out rows: give generate_rows"


class SFTConfig(
    PartSettings,
    LoraSettings,
    SamplerSettings,
    RewardSettings,
    EvaluationSettings,
    RowSettings,
    EpochSettings,
    TrainingConfig,
    DataSettings,
):
    """Supervised fine-tuning: raise the likelihood of what the data answers.

    Each step takes `rows_per_step` rows and descends the mean loss of all their trained tokens.
    """

    dataset: str | None = None
    """A .jsonl, .json, .csv or .parquet file, or a hub name, with `messages` (or ShareGPT's `conversations`), `prompt`
    and `completion`, `text`, or `input_ids`."""
    train_rows: int | None = Field(None, ge=1)
    """Train on so many rows only, the first ones that are not held out; default: all."""
    rows_per_step: int = Field(16, ge=1)
    """Rows in one step (TRL: 8 on each device)."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate; an adapter takes some ten times more than whole weights."""
    loss_type: Literal["nll", "dft"] = "nll"
    """Of a token: its negative log-likelihood, or that times the token's own probability (dft, arXiv:2508.05629)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the target that all tokens of the vocabulary have alike; with nll only."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of (log Z)², which holds the logits in place (PaLM: 1e-4)."""
    neftune_alpha: float = Field(0.0, ge=0)
    """Noise on the input embeddings in training (NEFTune, arXiv:2310.05914: 5 to 15); 0: none."""
    packing: bool | None = Field(None, json_schema_extra=FREE)
    """Lay rows end to end, each attending to itself alone, instead of padding rows of similar length. Default: where
    the model's attention allows it. Speed and memory only, the result stays."""
    tokens_per_part: int = Field(1024, ge=1, json_schema_extra=FREE)
    """Tokens, padding included, that go forward and backward together; lower it if memory runs out, raise it on a GPU.
    Speed and memory only, the result stays."""
    generate_rows: int = Field(0, ge=0)
    """Held-out rows that the model also answers, greedily, in each evaluation, scored by the reward functions: the
    first whose question leaves room for max_tokens."""
    patience: int = Field(0, ge=0, json_schema_extra=FREE)
    """Stop after so many evaluations without a lower held-out loss; 0: never. Needs eval_every."""

    @model_validator(mode="after")
    def _sft_fits_together(self) -> Self:
        if self.label_smoothing and self.loss_type != "nll":
            raise ValueError(f"label_smoothing goes with loss_type nll, and this is {self.loss_type}")
        if self.patience and (not self.eval_every or self.eval_rows == 0):
            raise ValueError(f"patience is {self.patience}, which needs eval_every and eval_rows")
        if self.eval_rows is not None and self.generate_rows > self.eval_rows:
            raise ValueError(f"generate_rows {self.generate_rows} exceed eval_rows {self.eval_rows}")
        if self.generate_rows and self.mask == "all":
            raise ValueError("generate_rows asks what stands before an answer; with mask all nothing does: give auto")
        if not self.streaming:
            refuse_unread(self, ("shuffle_window",), "data in memory is shuffled whole (see streaming)")
        if self.train_rows and self.streaming:
            raise ValueError("train_rows is for data in memory: steps says how much of a stream is trained on")
        if self.train_rows and self.mix:
            raise ValueError("train_rows counts the rows of one data set: with mix, steps says how many are trained on")
        if self.rewards and not self.generate_rows:
            raise ValueError(REWARDS_SCORE_ANSWERS)
        return self
