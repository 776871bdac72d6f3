"""Losses of reward models: which of two is better, how good one is, in which order several stand.

Each returns one loss per row, to be minimized; a row's loss depends on that row alone, so a batch may be cut anywhere.
Margins, targets and labels are constants: no gradient flows into them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from taurl.functional._inputs import (
    at_least_float32,
    require_mask,
    require_positive,
    require_rows,
    require_same_shape,
)
from taurl.functional.value_losses import huber_value_loss


def pairwise_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margins: Tensor | None = None,
    centering: float = 0.0,
) -> Tensor:
    """Bradley–Terry: minus the log-probability that the chosen one beats the rejected one.

        loss = −log σ( f(x_i) − f(x_j) − m ) + c · ( f(x_i) + f(x_j) )²,   i chosen, j rejected

    Only differences of rewards matter to the first term, so f is known up to a constant per prompt; a small c > 0
    (0.01) settles it where the two rewards have mean 0. A margin m > 0 asks a clearly better answer to win clearly.

    Args:
        chosen_rewards, rejected_rewards: float [N], f(x_i) and f(x_j).
        margins: float [N], m; none is 0.
        centering: c ≥ 0; TRL calls it `center_rewards_coefficient`.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or centering is negative.
    Source: Bradley and Terry 1952; margin: Touvron et al. 2023, arXiv:2307.09288; centering: Eisenstein et al. 2023,
        arXiv:2312.09244, eq. 2.
    """
    require_rows(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    if not 0 <= centering < float("inf"):
        raise ValueError(f"centering is {centering}, expected a finite number of at least 0")
    chosen, rejected = at_least_float32(chosen_rewards), at_least_float32(rejected_rewards)
    differences = chosen - rejected
    if margins is not None:
        require_rows(chosen_rewards=chosen_rewards, margins=margins)
        differences = differences - margins.detach().to(differences.dtype)
    loss = -functional.logsigmoid(differences)
    return loss + centering * (chosen + rejected).square() if centering else loss


def regression_loss(rewards: Tensor, targets: Tensor, *, huber_threshold: float = math.inf) -> Tensor:
    """Point-wise regression of a score.

        d = f(x) − y
        loss = ½ d²             |d| ≤ δ, so everywhere without a threshold: the MSE is twice its mean
               δ (|d| − ½ δ)    otherwise (Huber): outliers pull with force δ at most

    It is `huber_value_loss` of a score, with the factor ½ of all squared errors there.

    Args:
        rewards: float [N], f(x).
        targets: float [N], y.
        huber_threshold: δ > 0; by default none.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or the threshold is not positive.
    Source: Huber 1964, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics 35(1).
    """
    require_rows(rewards=rewards, targets=targets)
    if not huber_threshold > 0:
        raise ValueError(f"huber_threshold is {huber_threshold}, expected a positive number")
    rewards = at_least_float32(rewards)
    return huber_value_loss(rewards, targets.to(rewards.dtype), threshold=huber_threshold)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Point-wise classification into good and bad: binary cross-entropy.

        loss = −y · log σ(f(x)) − (1 − y) · log σ(−f(x))

    Args:
        logits: float [N], f(x).
        labels: bool [N], or float [N] in [0, 1] for the share of raters who said good.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or a label is outside [0, 1].
    """
    require_rows(logits=logits, labels=labels)
    values = at_least_float32(logits)
    labels = labels.detach().to(values.dtype)
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, expected booleans or numbers in [0, 1]")
    return functional.binary_cross_entropy_with_logits(values, labels, reduction="none")


def ordinal_loss(rewards: Tensor, labels: Tensor, *, classes: int, spacing: float = 1.0) -> Tensor:
    """Point-wise classification into ordered classes 0, 1, …, K − 1: the proportional odds model.

        P(y > k) = σ( f(x) − b_k ),   b_k = s · ( k − (K − 2) / 2 ),   k = 0 … K − 2
        loss = −log [ P(y > label − 1) − P(y > label) ],   P(y > −1) = 1, P(y > K − 1) = 0

    The thresholds b_k are fixed, s apart and about 0, so that f alone is learned: a class asks for a stretch of f, the
    first and the last for all that lies beyond. Two classes are `classification_loss`.

    Args:
        rewards: float [N], f(x).
        labels: int [N], or float [N] of whole numbers.
        classes: K ≥ 2.
        spacing: s > 0.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes differ, there are fewer than two classes, the spacing is not positive, or a label is
        none of the classes.
    Source: McCullagh 1980, "Regression Models for Ordinal Data", Journal of the Royal Statistical Society B 42(2).
    """
    require_rows(rewards=rewards, labels=labels)
    require_positive(spacing=spacing)
    if classes < 2:
        raise ValueError(f"classes is {classes}, expected at least 2")
    classed = labels.long()
    if not ((classed == labels) & (classed >= 0) & (classed < classes)).all():
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, expected whole numbers below {classes}")
    values = at_least_float32(rewards)
    above = values - spacing * (classed - 1 - (classes - 2) / 2)  # f − b_{label − 1}
    below = spacing - above  # b_label − f
    # σ(a) − σ(−c) = σ(a) σ(c) (1 − e^{−(a + c)}), and a + c is the spacing: nothing cancels.
    between = functional.logsigmoid(above) + functional.logsigmoid(below) + math.log(-math.expm1(-spacing))
    likelihood = torch.where(classed == 0, functional.logsigmoid(below), between)
    return -torch.where(classed == classes - 1, functional.logsigmoid(above), likelihood)


def plackett_luce_loss(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Minus the log-probability of a ranking: the best is drawn first, then the best of the rest, and so on.

        loss_n = −Σ_k [ f_k − log Σ_{j ≥ k} exp f_j ],   k, j over the valid entries, best first

    A list of two is `pairwise_loss`; a list of one, or of none, has loss 0. The sum grows with the length of the list:
    divide by it where lists of all lengths should count alike.

    Args:
        rewards: float [N, K], column 0 the best. Masked entries may hold anything and get no gradient.
        mask: bool [N, K], the valid entries, anywhere in the row; by default all.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if rewards are not float [N, K], shapes differ or the mask is not boolean.
    Source: Plackett 1975, "The Analysis of Permutations", Applied Statistics 24(2); Luce 1959, "Individual Choice
        Behavior"; for reward models: Rafailov et al. 2023, arXiv:2305.18290.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype} {list(rewards.shape)}, expected floats [N, K]")
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    require_mask(mask)
    require_same_shape(rewards=rewards, mask=mask)
    length = rewards.shape[1]
    values = torch.where(mask, at_least_float32(rewards), 0.0)
    # [N, K, K], row k the entries still to be drawn: lists are short, and a cumulative log-sum-exp over masked entries
    # has no exact gradient. The diagonal keeps the rows of masked entries finite, backwards too.
    rest = torch.ones(length, length, dtype=torch.bool, device=rewards.device).triu() & mask[:, None, :]
    rest = rest | torch.eye(length, dtype=torch.bool, device=rewards.device)
    normalizers = values[:, None, :].expand(-1, length, -1).masked_fill(~rest, -torch.inf).logsumexp(2)
    return torch.where(mask, normalizers - values, 0.0).sum(1)
