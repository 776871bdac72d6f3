"""Settings of RLHF with PPO. Imports no torch, so that the command line answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from taurl.llm.algorithms.online_config import OnlineConfig
from taurl.runtime.config import refuse_unread

UNREAD_BY_ENVIRONMENTS = (
    "reward_weights",
    "reward_timeout",
    "reward_process",
    "columns",
    "dataset_args",
    "answer_after",
    "prompt_format",
)
ENVIRONMENT_ALONE = "an environment gives prompts and rewards itself: leave dataset, eval_dataset and rewards out"


class PPOConfig(OnlineConfig):
    """RLHF with PPO (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155).

    Each step samples completions, scores them, and prices each token's divergence from the reference; a critic says
    what was to be expected at every token. The policy climbs PPO's clipped surrogate of the advantages, the critic
    descends towards the returns.
    """

    environment: str | None = None
    """In place of data and rewards, a conversation of several turns: module:name or file.py:name of what makes an
    environment from a seed, with reset() → messages and step(completion) → messages, reward, done."""
    max_turns: int = Field(8, ge=1)
    """Turns of the policy in one episode of an environment; one that is not over then is truncated."""
    reference: str | None = None
    """Model to stay near; by default the starting weights."""
    critic: str = "copy"
    """What estimates values. copy: a model of its own that starts from the policy's weights; with LoRA an adapter of
    its own on the policy's frozen weights. head: a linear layer on the policy's own hidden states. none: no values. Or
    the model to start from: a folder or a hub name, for example that of a reward model."""

    prompts_per_step: int = Field(64, ge=1)
    """Prompts (or seeds of an environment) in one step."""
    group_size: int = Field(1, ge=1)
    """Completions of each prompt (or episodes of each seed)."""
    epochs: int = Field(2, ge=1)
    """Passes over the step's completions (InstructGPT: 1, TRL: 4)."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """Ratios below 1 − clip_low gain nothing more from a negative advantage."""
    clip_high: float = Field(0.2, ge=0)
    """Ratios above 1 + clip_high gain nothing more from a positive advantage."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = Field(None, gt=0)
    """Stop a step's updates once the mean divergence of a token from the policy that sampled exceeds 1.5 times this. It
    is measured as an update is computed, and that update is still taken."""

    discount: float = Field(1.0, ge=0, le=1)
    """γ, from one token to the next."""
    trace_decay: float = Field(0.95, ge=0, le=1)
    """λ of generalised advantage estimation: 0 trusts the values, 1 the rewards that followed, as one must without a
    critic."""
    whiten: Literal["batch", "group", "none"] = "batch"
    """Advantages with mean 0 and standard deviation 1: over all tokens of the step; or within each prompt's group, by
    the completions' mean advantages, as GRPO does; or as they are."""

    critic_learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of the critic; warm-up and schedule are the policy's. It may be higher: the value head starts
    at 0."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the value loss where the critic is a head on the policy's weights, which both losses then move."""
    value_clip: float | None = Field(0.2, ge=0)
    """Values that have moved further than this from those before the step gain nothing more by it; None does not
    clip. In units of the rewards."""
    value_warmup_steps: int = Field(0, ge=0)
    """First steps in which the critic learns and the policy stays. Learning rates warm up (warmup_steps) meanwhile."""

    kl_coefficient: float = Field(0.05, ge=0)
    """Weight β of the divergence from the reference; 0 keeps no reference."""
    kl_target: float | None = Field(None, gt=0)
    """Adapt β, so that the divergence of a completion from the reference comes near this many nats."""
    kl_gain: float = Field(0.1, gt=0, lt=5)
    """How fast β follows: by this share of the relative error, which counts up to 0.2, in each step."""
    kl_place: Literal["reward", "loss"] = "reward"
    """A token's divergence is subtracted from its reward, or added to its loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Schulman's estimators, of x = log π − log π_ref: k1 is x, k2 is x²/2, k3 is exp(−x) − 1 + x. In the reward k1
    gives the gradient of the divergence; k2 and k3 are biased there, they hardly pull near the reference. As a loss k1
    gives 0 and is refused; k2 lacks what a token does to later ones, and k3 is a biased approximation of that."""

    truncated: Literal["bootstrap", "penalty", "mask"] | None = None
    """What a completion that hit max_tokens (an episode that ran out of turns) earns. penalty: its score less
    missing_eos_penalty, as if it had ended. bootstrap: the value of its end, in place of the score of what is not
    finished (after an episode's rewards of its turns), which a critic has to have learned: one that starts at 0 makes
    being cut off better than any score below 0. mask: nothing, it is not trained on. None: bootstrap for episodes,
    where there is a critic, and else penalty."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score of a truncated completion, where that is what it earns; after normalize_rewards and
    reward_clip, so in their units."""
    normalize_rewards: bool = False
    """Subtract the running mean of the scores and divide by their running deviation; the rewards of an environment's
    turns are divided only."""
    reward_clip: float | None = Field(None, gt=0)
    """Largest size of a score, after normalisation."""

    @model_validator(mode="after")
    def _ppo_fits_together(self) -> Self:
        if self.truncated == "bootstrap" and self.critic == "none":
            raise ValueError("truncated is bootstrap, but without a critic there is no value: choose penalty or mask")
        if self.kl_place == "loss" and self.kl_estimator == "k1" and self.kl_coefficient > 0:
            raise ValueError("kl_estimator is k1, whose gradient as a loss is 0: choose k2 or k3, or kl_place reward")
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target needs a kl_coefficient above 0 to begin with")
        if self.whiten == "group" and self.group_size < 2:
            raise ValueError(f"whiten is group, but group_size is {self.group_size}: one completion has no deviation")
        if self.environment is not None and (self.rewards or self.dataset is not None or self.eval_dataset is not None):
            raise ValueError(ENVIRONMENT_ALONE)
        if self.critic == "none" and self.value_warmup_steps:
            raise ValueError("value_warmup_steps needs a critic")
        if self.critic == "none" and self.trace_decay < 1:
            raise ValueError(
                f"trace_decay is {self.trace_decay:g}, but without a critic there is no value to trust, and a reward "
                "would only fade on its way back: set trace_decay to 1"
            )
        return self


def refuse_unread_by_ppo(config: PPOConfig, *, environment: bool, critic: object) -> None:
    """Refuse settings that were given and that this way of running does not read.

    Args:
        environment: whether one gives prompts and rewards.
        critic: as the run has it, a word of `PPOConfig.critic` or a model.
    """
    if not environment:
        refuse_unread(config, ["max_turns"], "there is no environment that has turns")
    else:
        refuse_unread(config, UNREAD_BY_ENVIRONMENTS, "an environment gives prompts and rewards itself")
    if config.truncated != "penalty":
        refuse_unread(config, ["missing_eos_penalty"], f"truncated is {config.truncated} here, not penalty")
    if critic != "head":
        refuse_unread(config, ["value_coefficient"], "the critic is no head on the policy's own weights")
    if config.kl_coefficient == 0:
        refuse_unread(config, ["kl_estimator", "kl_place"], "kl_coefficient is 0")
    if config.kl_target is None:
        refuse_unread(config, ["kl_gain"], "without a kl_target β stays as it is")
