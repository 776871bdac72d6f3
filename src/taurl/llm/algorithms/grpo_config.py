"""Settings of GRPO. Imports no torch, so that the command line answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.llm.algorithms.online_config import OnlineConfig
from taurl.runtime.config import refuse_unread

# What each loss type in place of the clip does not read.
UNREAD = {
    "cispo": ("clip_low",),
    "sapo": ("clip_low", "clip_high"),
    "vespo": ("clip_low", "clip_high", "importance_mode", "importance_cap"),
}


class GRPOConfig(OnlineConfig):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

    Each step samples `group_size` completions of `prompts_per_step` prompts, scores them with the reward functions,
    takes a completion's advantage from the rewards of its group, and climbs the clipped surrogate.
    """

    group_size: int = Field(8, ge=2)
    """Completions of each prompt."""
    scale_rewards: Literal["group", "batch", "mean", "none"] = "group"
    """Divide the centred rewards by the standard deviation of the group, of the batch, by the group's mean (MaxRL, for
    rewards of 0 or 1: prompts that are rarely solved weigh more), or not at all (Dr. GRPO)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How a completion's advantage becomes a loss, by TRL's names. PPO's clip with the mean over sequences of their
    tokens' mean (grpo), the sum over tokens divided by max_tokens (dr_grpo), the mean over all tokens of the step
    (dapo; bnpo, which in TRL depends on how the batch is cut, is the same here), or the sum over tokens of sequence
    ratios (luspo). Or, in place of the clip: clipped importance weights without a gradient of their own (cispo), a
    smooth gate about ratio 1 (sapo), a smooth function of the whole trajectory's weight (vespo)."""
    ratio_level: Literal["token", "sequence", "sequence_token"] | None = None
    """Importance ratio of each token, of the whole sequence (GSPO), or with the value of the sequence's and the
    gradient of the token's (GSPO-token). None: that of the loss type, sequence for luspo and token for the others;
    vespo has none."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """Ratios below 1 − clip_low gain nothing more from a negative advantage."""
    clip_high: float | None = Field(None, ge=0)
    """Ratios above 1 + clip_high gain nothing more from a positive advantage (DAPO: 0.28). None: 0.2, and 4 for cispo,
    whose weights it caps."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight β of the divergence from the reference, the starting weights. 0 keeps no reference (the GRPO paper: 0.04;
    TRL: 0)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators, of x = log π − log π_ref: k1 is x, k2 is x²/2, k3 is exp(−x) − 1 + x."""
    kl_place: Literal["reward", "loss", "weighted_loss"] = "loss"
    """What is descended depends on where the estimate stands, KL below being KL(π‖π_ref). In the reward, subtracted
    from the advantages: k1 gives ∇KL; k2 and k3 hardly pull near the reference. As a loss: k1 gives 0, noise; k2 of
    the sequence gives ∇KL, and per token ∇KL but for what a token does to later ones; k3 of the sequence gives
    ∇KL(π_ref‖π), and per token a biased approximation of ∇KL (GRPO's own, the default). As a loss weighted by the
    importance ratio: all give ∇KL, but for k2 per token. Exactly so, up to a factor, on a step's first update, with
    loss_type dr_grpo, ratio_level token and scale_rewards none: others divide by lengths, deviations or means (dapo by
    the step's tokens, which for large steps is nearly a factor too).
    Table and proofs: taurl.functional.kl."""
    kl_level: Literal["token", "sequence"] = "token"
    """One estimate a token (in the reward with what follows it), or one of the whole sequence's log-ratio."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    mask_truncated: bool = False
    """Leave completions that hit max_tokens out of the loss (DAPO's overlong filtering)."""

    @model_validator(mode="after")
    def _loss_fits_together(self) -> Self:
        if self.loss_type == "vespo" and self.ratio_level is not None:
            raise ValueError(f"ratio_level is {self.ratio_level}, but vespo weighs whole trajectories: leave it out")
        refuse_unread(self, UNREAD.get(self.loss_type, ()), f"loss_type {self.loss_type} does not read it")
        if not self.kl_coefficient:
            why = "kl_coefficient is 0, so that there is no reference to diverge from"
            refuse_unread(self, ("kl_estimator", "kl_place", "kl_level"), why)
        return self
