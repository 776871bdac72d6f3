"""Settings of DPO and its family. Imports no torch, so that the command line answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.llm.algorithms.online_config import SampledConfig
from taurl.llm.settings import EpochSettings, PreferenceSettings
from taurl.runtime.config import FREE

UNPAIRED_LOSSES = frozenset({"kto", "apo_zero_unpaired"})
REFERENCE_FREE_LOSSES = frozenset({"cpo", "simpo", "orpo", "sft"})
DEFAULT_BETA, DEFAULT_SIMPO_BETA = 0.1, 2.0  # TRL has 0.1 for both, at which SimPO's sigmoid is nearly flat

PreferenceLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "exo_pair",
    "hinge",
    "ipo",
    "discopop",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
    "sft",
    "cpo",
    "simpo",
    "orpo",
    "kto",
    "apo_zero_unpaired",
]


class DPOConfig(EpochSettings, PreferenceSettings, SampledConfig):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and its family.

    Each step takes `prompts_per_step` rows, each a prompt with a chosen and a rejected answer, and raises the chosen
    one's likelihood against the rejected one's, both measured against a reference. With `loss_type: kto` rows are
    single answers with a label; with `rewards` the answers are sampled from the policy and judged (online DPO).
    """

    dataset: str | None = None
    """A .jsonl, .json, .csv or .parquet file, or a hub name, with columns `prompt`, `chosen`, `rejected` (the prompt
    may be the common beginning of the other two), for KTO also `prompt`, `completion`, `label`; with `rewards` any
    data set with a column `prompt`, reasoning-gym:TASK too."""
    rewards: tuple[str, ...] = ()
    """Reward functions make the run online: the policy samples `group_size` answers to a prompt, and the best and the
    worst of them are the pair. module:function, file.py:function, the name of a shipped one (last_number), or a reward
    model: model:runs/NAME/final."""
    reference: str | None = None
    """The model that the policy is measured against: a folder or a name as for `model`. By default the weights that
    training starts from, with lora_rank the model without its adapter."""
    cache_reference: bool = True
    """Compute the reference's log-probabilities before training, once for each row that the run will take, and keep
    them on disk for runs with the same model, data and batches; the reference then needs no memory while training.
    False: anew at each step. (Online they cannot be known before.)"""

    prompts_per_step: int = Field(8, ge=1)
    """Rows in one step: pairs, single answers (KTO), or prompts that are sampled from."""
    group_size: int = Field(2, ge=2)
    """Answers that are sampled to each prompt, with `rewards`."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, with `rewards`; what is trained are the log-probabilities of temperature 1."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a sampled answer that hit max_tokens, so that one which ended is preferred."""
    loss_type: tuple[PreferenceLoss, ...] = ("sigmoid",)
    """One loss, or several whose weighted sum is descended, by TRL's names: sigmoid (DPO), sigmoid_norm (its
    log-ratios per token), robust and exo_pair (noisy labels), hinge (SLiC, RSO), ipo, discopop, nca_pair, bco_pair,
    sppo_hard, apo_zero, apo_down, aot and aot_unpaired (sorted over the batch), sft (likelihood of the chosen answer);
    without a reference cpo, simpo and orpo; of single answers kto and apo_zero_unpaired."""
    loss_weights: tuple[float, ...] | None = None
    """One weight a loss; 1 each by default."""
    beta: float | None = Field(None, gt=0)
    """How closely the reference is kept: a difference of 1/beta nats makes the reward 1. None: 0.1, and 2 for simpo,
    alone or with sft. (sigmoid_norm takes about 5; for orpo it is the weight of the odds ratio.)"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is the wrong way round."""
    divergence: Literal["reverse_kl", "js_divergence", "forward_kl", "alpha_divergence"] = "reverse_kl"
    """How the distance from the reference is measured, for losses of the difference of two log-ratios."""
    divergence_alpha: float = Field(0.5, ge=0, le=1)
    """α of alpha_divergence: 0 is reverse_kl, 1 forward_kl (1 minus TRL's f_alpha_divergence_coef)."""
    excess_weight: float = Field(1.0, ge=0, le=1)
    """What a token counts that an answer has more than the other one of its pair (LD-DPO's α, TRL's ld_alpha), for
    losses with a reference."""
    discopop_temperature: float = Field(0.05, gt=0)
    """τ of discopop."""
    reward_shift: Literal["none", "running"] = "none"
    """δ of bco_pair: 0, or the mean of all rewards so far (the paper; one more forward pass)."""
    likelihood_weight: float = Field(1.0, ge=0)
    """Weight of the chosen answer's likelihood in cpo."""
    target_margin: float = Field(1.0, ge=0)
    """γ of simpo, the margin that the reward per token shall have (TRL: 0.5)."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of liked answers, in kto and apo_zero_unpaired."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of disliked answers, in kto and apo_zero_unpaired."""

    samples_per_step: int = Field(4, ge=0, json_schema_extra=FREE)
    """Sampled answers of each step that are kept in samples.jsonl, with `rewards`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.loss_type or len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"loss_type is {list(self.loss_type)}: expected one loss, or several different ones")
        weights = self.loss_weights
        if weights is not None and len(weights) != len(self.loss_type):
            raise ValueError(f"{len(weights)} loss_weights for {len(self.loss_type)} losses in loss_type")
        if self.unpaired and len(self.loss_type) > 1:
            raise ValueError(f"loss_type is {list(self.loss_type)}: kto and apo_zero_unpaired mix with no other loss")
        return self

    @property
    def mixture(self) -> dict[str, float]:
        """The losses with their weights."""
        return dict(zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type), strict=True))

    @property
    def unpaired(self) -> bool:
        """Whether rows are single answers."""
        return bool(UNPAIRED_LOSSES & set(self.loss_type))

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference."""
        return not set(self.loss_type) <= REFERENCE_FREE_LOSSES

    @property
    def strength(self) -> float:
        """β, with its default."""
        alone = set(self.loss_type) - {"sft"} == {"simpo"}  # sft reads none
        default = DEFAULT_SIMPO_BETA if alone else DEFAULT_BETA
        return default if self.beta is None else self.beta
