"""Figures of a DPO step: what the policy gives to the answers, and a word where both of a pair become less likely."""

import math
from collections import deque
from typing import Any

import numpy as np
from torch import Tensor

from taurl.functional.direct_preference import per_token
from taurl.functional.log_ratios import implicit_rewards
from taurl.llm.algorithms.dpo_config import DPOConfig

REWARDED_PER_TOKEN = frozenset({"simpo", "orpo"})
STEPS_OF_A_FALL = 10


def answer_rewards(config: DPOConfig, logprobs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """The rewards [N, K] that the policy stands for: β · log π/π_ref; without a reference β · log π, per token in
    simpo and orpo."""
    rewards = implicit_rewards(logprobs.flatten(), reference.flatten(), beta=config.strength)
    if set(config.loss_type) & REWARDED_PER_TOKEN and not config.needs_reference:
        rewards = per_token(rewards, lengths.flatten())
    return rewards.view(logprobs.shape)


def pair_figures(rewards: Tensor, logprobs: Tensor) -> dict[str, float]:
    """Metrics of pairs [N, 2], by TRL's names. Two equal rewards do not count as told apart."""
    chosen, rejected = rewards.double().unbind(1)
    return {
        "rewards/accuracies": float((chosen > rejected).double().mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "logps/chosen": float(logprobs[:, 0].double().mean()),
        "logps/rejected": float(logprobs[:, 1].double().mean()),
    }


def unpaired_figures(rewards: Tensor, logprobs: Tensor, desirable: Tensor) -> dict[str, float]:
    """The same of single answers [N, 1], liked ones as chosen; what a batch has none of is left out."""
    figures = {}
    for name, rows in {"chosen": desirable, "rejected": ~desirable}.items():
        if rows.any():
            figures[f"rewards/{name}"] = float(rewards[rows].double().mean())
            figures[f"logps/{name}"] = float(logprobs[rows].double().mean())
    if len(figures) == 4:
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    return figures


class FallWatch:
    """Notices, once, that chosen and rejected answers have both become less likely since the run began.

    The mean rewards of the last ten steps are compared with those of the first step, which are those before any
    update: 0 where the weights that training starts from are the reference. Each step has other rows, so a difference
    counts from two standard errors on, and rewards that are not 0 at first have an error there too.
    """

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None
        self.last: deque[tuple[float, float]] = deque(maxlen=STEPS_OF_A_FALL)
        self.said = False

    def warning(self, figures: dict[str, Any]) -> str | None:
        """The words, at the step where both have first fallen."""
        if "rewards/margins" not in figures:
            return None
        rewards = figures["rewards/chosen"], figures["rewards/rejected"]
        if not all(isinstance(reward, float) and math.isfinite(reward) for reward in rewards):
            return None  # of a step that was not taken
        if self.first is None:
            self.first = rewards
            return None
        self.last.append(rewards)
        if self.said or len(self.last) < STEPS_OF_A_FALL:
            return None
        before, after = np.array(self.first), np.array(self.last)
        error = np.sqrt(after.var(0, ddof=1) * (1 / STEPS_OF_A_FALL + (before != 0)))
        fall = before - after.mean(0)
        if not (fall > 2 * error).all():
            return None
        self.said = True
        return (
            f"both likelihoods fall: the reward of the last {STEPS_OF_A_FALL} steps is below that of the first by "
            f"{fall[0]:.3g} for chosen and by {fall[1]:.3g} for rejected answers; a larger beta, a lower learning_rate "
            "or sft in loss_type holds the chosen ones up"
        )
