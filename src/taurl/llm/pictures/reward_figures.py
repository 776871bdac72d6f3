"""How good scores are: who wins, how sure the model is and how often it is right, and what length has to do with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taurl.llm.data.preference_rows import Form, JudgedRow

BINS = 10
QUARTERS = 4
NORMAL_95 = 1.959964  # standard deviations of a normal distribution that hold 95% of it


@dataclass(frozen=True)
class Comparisons:
    """All pairs of completions of which one was judged better, [C] each.

    Attributes:
        better, worse: their scores.
        margins: as given, 0 where the data has none.
        better_lengths, worse_lengths: tokens.
        independent: whether each pair has a row of its own.
    """

    better: np.ndarray
    worse: np.ndarray
    margins: np.ndarray
    better_lengths: np.ndarray
    worse_lengths: np.ndarray
    independent: bool

    @classmethod
    def of(cls, rows: Sequence[JudgedRow], scores: Sequence[Sequence[float]]) -> "Comparisons":
        """Of pairs and rankings; rows of a single completion compare nothing."""
        found = [
            (values[i], values[j], row.margin, len(row.completions[i]), len(row.completions[j]))
            for row, values in zip(rows, scores, strict=True)
            for i in range(len(row.completions))
            for j in range(i + 1, len(row.completions))
        ]
        columns = np.array(found, dtype=np.float64).reshape(-1, 5).T
        return cls(*columns, independent=all(len(row.completions) <= 2 for row in rows))  # type: ignore[misc]


def figures(
    form: Form, rows: Sequence[JudgedRow], scores: Sequence[Sequence[float]], *, binary: bool = True
) -> dict[str, float]:
    """Everything that can be said of these scores, by name.

    Args:
        scores: of each row's completions, or of a process's steps.
        binary: whether labels are 0 or 1, or shares between them: not of more than two classes.
    """
    if form == "process":
        labels = np.array([label for row in rows for label in row.step_labels])
        return classified(labels, np.array([value for values in scores for value in values]))
    flat = np.array([value for values in scores for value in values])
    lengths = np.array([len(completion) for row in rows for completion in row.completions])
    found: dict[str, float] = {}
    if any(len(row.completions) > 1 for row in rows):
        found |= compared(Comparisons.of(rows, scores))
    values = np.array([value for row in rows for value in row.values])
    if form == "label" and binary:
        found = classified(values, flat) | found  # the accuracy is that of the pairs, if there are any
    elif form in ("label", "score"):
        found |= {"correlation": correlation(values, flat), "rank_correlation": correlation(ranks(values), ranks(flat))}
    return found | {"mean_reward": float(flat.mean()), "length_correlation": correlation(lengths, flat)}


def compared(pairs: Comparisons) -> dict[str, float]:
    """Accuracy with its 95% interval and by margin, area under the curve, calibration, and who is longer.

    Equal scores count half. The quarters by margin are those of the data's margins, or where it has none of the size
    of the difference of the scores; the first holds the smallest.
    """
    differences = pairs.better - pairs.worse
    right = np.where(differences == 0, 0.5, differences > 0)
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    longer = np.sign(pairs.better_lengths - pairs.worse_lengths)
    unequal = longer != 0
    margins = pairs.margins if np.ptp(pairs.margins) > 0 else np.abs(differences)
    found = {"accuracy": float(right.mean())}
    if pairs.independent:
        found["accuracy_low"], found["accuracy_high"] = wilson_interval(float(right.sum()), len(right))
    found |= {
        "margin": float(differences.mean()),
        "auc": area_under_curve(pairs.better, pairs.worse),
        "calibration_error": calibration_error(confidence, right),
    }
    if unequal.any():
        found["longer_chosen"] = float((longer[unequal] > 0).mean())
        found["longer_preferred"] = float((np.sign(differences[unequal]) == longer[unequal]).mean())
    if len(right) >= QUARTERS:
        order = np.argsort(margins, kind="stable")
        for number, members in enumerate(np.array_split(order, QUARTERS), start=1):
            found[f"accuracy/margin_quarter_{number}"] = float(right[members].mean())
    return found


def classified(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Of scores that are logits of a label: accuracy, area under the curve, calibration."""
    probabilities = 1 / (1 + np.exp(-scores))
    return {
        "accuracy": float(((scores > 0) == (labels > 0.5)).mean()),
        "auc": area_under_curve(scores[labels > 0.5], scores[labels <= 0.5]),
        "calibration_error": calibration_error(probabilities, labels),
    }


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which stays inside [0, 1]."""
    share, z = successes / count, NORMAL_95**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z**2 / 4) / (1 + z)
    return middle - half, middle + half


def area_under_curve(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The probability that a positive scores above a negative, ties counting half; NaN without one of them."""
    if not len(positives) or not len(negatives):
        return math.nan
    together = ranks(np.concatenate([positives, negatives]))
    above = together[: len(positives)].sum() - len(positives) * (len(positives) - 1) / 2
    return float(above / (len(positives) * len(negatives)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value in ascending order, from 0; equal ones share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: np.ndarray = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return shared


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; NaN where one of them does not vary."""
    if len(one) < 2 or not np.ptp(one) or not np.ptp(other):
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def calibration(probabilities: np.ndarray, outcomes: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean probability, share of outcomes and count, of each tenth of [0, 1] that holds any."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return [
        (float(probabilities[place == bin_].mean()), float(outcomes[place == bin_].mean()), int((place == bin_).sum()))
        for bin_ in range(BINS)
        if (place == bin_).any()
    ]


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Mean distance of probability and share, weighed by the counts (expected calibration error); NaN for NaN."""
    if np.isnan(probabilities).any():
        return math.nan
    bins = calibration(probabilities, outcomes)
    return sum(abs(expected - found) * count for expected, found, count in bins) / len(probabilities)
