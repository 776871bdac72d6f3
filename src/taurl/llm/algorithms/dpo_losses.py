"""From the settings of a DPO run to the loss of its batch, which any part of the batch has its share of.

What a loss needs to know of the whole batch (a sort, a mean, a divergence) is taken before any part runs (promise 1).
"""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from taurl.functional.direct_preference import running_reward_shift
from taurl.functional.dpo import (
    DEFAULT_ALPHA,
    DEFAULT_DISCOPOP_TEMPERATURE,
    DIVERGENCE_LOSSES,
    SMOOTHED_LOSSES,
    WHOLE_BATCH_LOSSES,
    dpo_loss,
)
from taurl.functional.kto import kto_loss
from taurl.functional.reference_free import cpo_loss, orpo_loss, simpo_loss
from taurl.llm.algorithms.dpo_config import REFERENCE_FREE_LOSSES, UNPAIRED_LOSSES, DPOConfig, PreferenceLoss
from taurl.runtime.config import refuse_unread
from taurl.runtime.errors import InputError

# Settings that some losses read; another value than the default is refused where none of the run's does.
READERS: Mapping[str, frozenset[str]] = {
    "beta": frozenset(get_args(PreferenceLoss)) - {"sft"},
    "label_smoothing": SMOOTHED_LOSSES | {"cpo", "simpo"},
    "divergence": DIVERGENCE_LOSSES,
    "discopop_temperature": frozenset({"discopop"}),
    "reward_shift": frozenset({"bco_pair"}),
    "likelihood_weight": frozenset({"cpo"}),
    "target_margin": frozenset({"simpo"}),
    "excess_weight": frozenset(get_args(PreferenceLoss)) - UNPAIRED_LOSSES - REFERENCE_FREE_LOSSES,
    "desirable_weight": UNPAIRED_LOSSES,
    "undesirable_weight": UNPAIRED_LOSSES,
}
MEAN_LENGTH_LOSSES = frozenset({"sft", "cpo"})  # their likelihood is a mean over all tokens of the batch, as in TRL


def check_losses(config: DPOConfig) -> None:
    """Refuse settings that no loss of the run reads, or that are out of its range. Raises: InputError."""
    names = set(config.loss_type)
    for setting, readers in READERS.items():
        if not names & readers:
            refuse_unread(config, [setting], f"{', '.join(config.loss_type)} does not read it")
    if config.divergence != "reverse_kl" and (others := sorted(names - DIVERGENCE_LOSSES - {"sft"})):
        raise InputError(f"divergence is {config.divergence}, but {', '.join(others)} is defined for reverse_kl only")
    if config.excess_weight != 1 and (others := sorted(names & REFERENCE_FREE_LOSSES)):
        raise InputError(
            f"excess_weight is {config.excess_weight}, but {', '.join(others)} learns the likelihood of whole answers: "
            "leave one of them out"
        )
    if config.divergence_alpha != DEFAULT_ALPHA and config.divergence != "alpha_divergence":
        raise InputError(f"divergence_alpha is {config.divergence_alpha}, but {config.divergence} does not read it")
    if not config.unpaired:
        ones = torch.ones(1, 2)
        try:
            PairLoss(config, torch.zeros(1, 2), ones)(torch.tensor([0]), torch.zeros(1, 2))
        except ValueError as error:
            raise InputError(f"loss_type {', '.join(config.loss_type)}: {error}") from error


def sorts_the_batch(config: DPOConfig) -> bool:
    """Whether a loss of the run compares every row with every other."""
    return bool(WHOLE_BATCH_LOSSES & set(config.loss_type))


class PairLoss:
    """The mean loss over N pairs; called with some rows and their log-probabilities it gives their share of it.

    Args:
        reference: float [N, 2], log-probabilities under the reference, chosen and rejected; zeros without one.
        lengths: [N, 2], tokens of the answers.
        whole: float [N, 2], the current log-probabilities of the whole batch. With them a share has value and gradient
            of the whole batch's loss also where that sorts the rows; otherwise not needed.
        reward_shift: δ of bco_pair.
    """

    def __init__(
        self,
        config: DPOConfig,
        reference: Tensor,
        lengths: Tensor,
        *,
        whole: Tensor | None = None,
        reward_shift: float = 0.0,
    ):
        self.config, self.reference, self.lengths, self.reward_shift = config, reference, lengths, reward_shift
        self.mean_length = lengths[:, 0].to(reference.dtype).mean()
        self.known: tuple[Tensor, Tensor] | None = None
        if whole is not None:
            leaf = whole.detach().requires_grad_()
            with torch.enable_grad():
                losses = self._losses(leaf, slice(None))
                (slopes,) = torch.autograd.grad(losses.sum(), leaf)
            self.known = losses.detach(), slopes

    def __call__(self, rows: Tensor, logprobs: Tensor) -> Tensor:
        """The share of these rows [n], given their log-probabilities [n, 2]."""
        count = len(self.reference)
        if self.known is None:
            return self._losses(logprobs, rows).sum() / count
        # The losses are functions of the log-probabilities alone: their slopes stand for them in the backward pass.
        losses, slopes = self.known[0][rows], self.known[1][rows]
        moved = (slopes * (logprobs - logprobs.detach())).sum()  # 0, with the gradient wanted
        return (losses.sum() + moved) / count

    def _losses(self, logprobs: Tensor, rows: Tensor | slice) -> Tensor:
        losses = [
            weight * self._loss(name, logprobs, self.reference[rows], self.lengths[rows])
            for name, weight in self.config.mixture.items()
        ]
        return torch.stack(losses).sum(0)

    def _loss(self, name: str, logprobs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        config, beta = self.config, self.config.strength
        chosen, rejected = logprobs.unbind(1)
        chosen_lengths, rejected_lengths = lengths.unbind(1)
        if name in MEAN_LENGTH_LOSSES:
            chosen_lengths = self.mean_length.expand(len(chosen))
        if name == "cpo":
            return cpo_loss(
                chosen,
                rejected,
                chosen_lengths,
                beta=beta,
                likelihood_weight=config.likelihood_weight,
                label_smoothing=config.label_smoothing,
            )
        if name == "simpo":
            return simpo_loss(
                chosen,
                rejected,
                chosen_lengths,
                rejected_lengths,
                beta=beta,
                target_margin=config.target_margin,
                label_smoothing=config.label_smoothing,
            )
        if name == "orpo":
            return orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, odds_weight=beta)
        # Of a mixture each loss gets the options that it reads; the others are its neighbours'.
        parted = name in DIVERGENCE_LOSSES
        return dpo_loss(
            name,
            chosen,
            rejected,
            *reference.unbind(1),
            beta=beta,
            label_smoothing=config.label_smoothing if name in SMOOTHED_LOSSES else 0.0,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            divergence=config.divergence if parted else "reverse_kl",
            alpha=config.divergence_alpha if parted else DEFAULT_ALPHA,
            discopop_temperature=config.discopop_temperature if name == "discopop" else DEFAULT_DISCOPOP_TEMPERATURE,
            reward_shift=self.reward_shift if name == "bco_pair" else 0.0,
        )


class RewardShift:
    """δ of bco_pair, the mean of all rewards that the run has seen; a checkpoint holds it.

    Attributes:
        changes: counts the updates.
    """

    def __init__(self) -> None:
        self.state: tuple[float, int] = 0.0, 0
        self.changes = 0

    @property
    def mean(self) -> float:
        """δ."""
        return self.state[0]

    def update(self, rewards: Tensor) -> None:
        """Take in the rewards [N, 2] of a whole batch."""
        self.state = running_reward_shift(self.state, *rewards.unbind(1))
        self.changes += 1

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"mean": torch.tensor(self.state[0], dtype=torch.float64), "count": torch.tensor(self.state[1])}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.state = float(tensors["mean"]), int(tensors["count"])


class UnpairedLoss:
    """The mean loss over N single answers, by KTO; called as `PairLoss`, with log-probabilities [n, 1].

    Args:
        reference: float [N, 1].
        desirable: bool [N].
        kl_baseline: z₀, over the whole batch.
    """

    def __init__(self, config: DPOConfig, reference: Tensor, desirable: Tensor, kl_baseline: float):
        self.config, self.reference, self.desirable, self.kl_baseline = config, reference, desirable, kl_baseline

    def __call__(self, rows: Tensor, logprobs: Tensor) -> Tensor:
        """The share of these rows [n]."""
        losses = kto_loss(
            logprobs[:, 0],
            self.reference[rows, 0],
            self.desirable[rows],
            kl_baseline=self.kl_baseline,
            beta=self.config.strength,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )
        return losses.sum() / len(self.reference)
