"""The losses of reward models: of scores as they come out of the model to one loss a unit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from taurl.functional.preference import (
    classification_loss,
    ordinal_loss,
    pairwise_loss,
    plackett_luce_loss,
    regression_loss,
)
from taurl.llm.algorithms.reward_config import RewardConfig
from taurl.llm.data.preference_rows import Form, JudgedRow
from taurl.runtime.errors import InputError

FORMS: dict[str, Form] = {
    "bradley_terry": "pairs",
    "plackett_luce": "ranking",
    "mse": "score",
    "huber": "score",
    "bce": "label",
    "ordinal": "label",
    "process": "process",
}


def unit_count(rows: Sequence[JudgedRow], form: Form) -> int:
    """How many losses rows have: one a pair, a ranking, a labelled completion, a step."""
    if form in ("pairs", "ranking"):
        return len(rows)
    return sum(len(row.step_labels) if form == "process" else len(row.values) for row in rows)


def unit_losses(config: RewardConfig, rows: Sequence[JudgedRow], scores: Tensor, classes: int) -> Tensor:
    """The losses [U] of rows whose scores [M] stand one after the other.

    Args:
        classes: of ordinal labels.
    """
    judged = [value for row in rows for value in (row.step_labels or row.values)]
    targets = torch.tensor(judged, dtype=torch.float64, device=scores.device)
    match config.loss:
        case "bradley_terry":
            chosen, rejected = scores.view(-1, 2).unbind(1)
            margins = torch.tensor([row.margin for row in rows], dtype=torch.float64, device=scores.device)
            return pairwise_loss(chosen, rejected, margins=margins, centering=config.centering)
        case "plackett_luce":
            lists = torch.split(scores, [len(row.completions) for row in rows])
            longest = max(map(len, lists))
            padded = torch.stack([torch.nn.functional.pad(one, (0, longest - len(one))) for one in lists])
            mask = [[place < len(one) for place in range(longest)] for one in lists]
            return plackett_luce_loss(padded, torch.tensor(mask, device=scores.device))
        case "mse":
            return regression_loss(scores, targets)
        case "huber":
            return regression_loss(scores, targets, huber_threshold=config.huber_threshold)
        case "ordinal":
            return ordinal_loss(scores, targets, classes=classes)
    return classification_loss(scores, targets)


def checked_classes(rows: Sequence[JudgedRow], config: RewardConfig) -> int:
    """How many classes ordinal labels have, 2 for other losses.

    Raises: InputError where the labels are not those that the loss learns.
    """
    values = sorted({value for row in rows for value in (row.step_labels or row.values)})
    if config.loss in ("bce", "process") and values and not 0 <= values[0] <= values[-1] <= 1:
        raise InputError(f"labels run from {values[0]:g} to {values[-1]:g}; {config.loss} expects them between 0 and 1")
    if config.loss != "ordinal":
        return 2
    if any(value < 0 or value != int(value) for value in values):
        wrong = next(value for value in values if value < 0 or value != int(value))
        raise InputError(f"a label is {wrong:g}; ordinal expects whole numbers from 0 on")
    return max(2, int(values[-1]) + 1)
