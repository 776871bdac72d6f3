"""Settings of reward models. Imports no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.llm.settings import (
    DataSettings,
    EpochSettings,
    EvaluationSettings,
    LoraSettings,
    PartSettings,
    PreferenceSettings,
    PromptSettings,
)
from taurl.runtime.config import TrainingConfig, refuse_unread


class RewardConfig(
    PartSettings,
    LoraSettings,
    PreferenceSettings,
    EvaluationSettings,
    PromptSettings,
    EpochSettings,
    TrainingConfig,
    DataSettings,
):
    """Reward models: one score for a completion, learned from pairs, rankings, scores or labels.

    Each step takes `rows_per_step` rows, scores their completions, and descends the loss of the scores.
    """

    dataset: str | None = None
    """A .jsonl, .json, .csv or .parquet file, or a hub name, with the columns that the loss needs."""
    loss: Literal["bradley_terry", "plackett_luce", "mse", "huber", "bce", "ordinal", "process"] = "bradley_terry"
    """What is learned. Of pairs (`prompt, chosen, rejected`, and `margin` if there is one), that the chosen one scores
    higher (bradley_terry); of ranked lists (`prompt, completions`, best first), their order (plackett_luce); of single
    completions (`prompt, completion`) their `score` (mse, huber) or `label` (bce; ordinal for labels 0, 1, 2, …), of
    pairs 1 for chosen and 0 for rejected; of processes (`prompt, completions, labels`, one for each step) the label of
    each step, with a score at every step's end."""
    rows_per_step: int = Field(8, ge=1)
    """Rows (pairs, lists, completions) in one step."""
    centering: float = Field(0.0, ge=0)
    """Weight of the squared sum of a pair's scores, which holds their mean near 0 (0.01; bradley_terry only; TRL's
    center_rewards_coefficient)."""
    huber_threshold: float = Field(1.0, gt=0)
    """Errors beyond it count in proportion, not squared."""
    scale_rows: int = Field(256, ge=0)
    """Training rows that are scored at the end for the mean and deviation that `model:FOLDER(normalize=True)` uses; 0
    leaves them unknown."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.loss != "bradley_terry":
            refuse_unread(self, ("centering",), f"{self.loss} compares no pairs")
        if self.loss != "huber":
            refuse_unread(self, ("huber_threshold",), f"{self.loss} does not read it")
        return self
