"""Figures of held-out scores, against plain loops."""

import math

import numpy as np
import pytest

from taurl.llm.data.preference_rows import JudgedRow
from taurl.llm.pictures import reward_figures
from taurl.llm.pictures.reward_pictures import pictures


def pair(chosen=1, rejected=1, margin=0.0):
    return JudgedRow([1], [[2] * chosen, [2] * rejected], margin)


def test_of_pairs():
    rows = [pair(3, 1), pair(1, 2), pair(2, 2), pair(5, 1)]
    scores = [[1.0, 0.0], [0.5, 0.5], [2.0, -1.0], [-1.0, 1.0]]
    found = reward_figures.figures("pairs", rows, scores)
    assert found["accuracy"] == 2.5 / 4
    assert found["margin"] == pytest.approx(0.5)
    wins = sum((c > r) + 0.5 * (c == r) for c, _ in scores for _, r in scores)
    assert found["auc"] == wins / 16
    assert found["longer_chosen"] == pytest.approx(2 / 3)
    assert found["longer_preferred"] == pytest.approx(1 / 3)
    assert found["length_correlation"] == pytest.approx(
        np.corrcoef([3, 1, 1, 2, 2, 2, 5, 1], [v for s in scores for v in s])[0, 1]
    )
    assert [found[f"accuracy/margin_quarter_{q}"] for q in (1, 2, 3, 4)] == [0.5, 1.0, 0.0, 1.0]
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]


def test_margins_of_the_data_make_the_quarters():
    rows = [pair(margin=m) for m in (4.0, 3.0, 2.0, 1.0)]
    found = reward_figures.figures("pairs", rows, [[1, 0], [1, 0], [0, 1], [0, 1]])
    assert [found[f"accuracy/margin_quarter_{q}"] for q in (1, 2, 3, 4)] == [0, 0, 1, 1]


def test_rankings_count_all_their_pairs_and_have_no_interval():
    found = reward_figures.figures("ranking", [JudgedRow([1], [[2], [2, 2], [2]])], [[3.0, 1.0, 2.0]])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert "accuracy_low" not in found


def test_labels_scores_and_steps():
    labelled = [JudgedRow([1], [[2]], values=[v]) for v in (1.0, 0.0, 1.0)]
    found = reward_figures.figures("label", labelled, [[2.0], [-1.0], [-3.0]])
    assert (found["accuracy"], found["auc"]) == (2 / 3, 0.5)
    found = reward_figures.figures("label", labelled, [[2.0], [-1.0], [-3.0]], binary=False)  # of classes 0, 1, 2, …
    assert "accuracy" not in found
    found = reward_figures.figures("score", labelled, [[2.0], [-1.0], [-3.0]])
    assert found["correlation"] == pytest.approx(np.corrcoef([1, 0, 1], [2, -1, -3])[0, 1])
    assert math.isnan(found["length_correlation"])
    steps = [JudgedRow([1], [[2, 2]], step_ends=[0, 1], step_labels=[1.0, 0.0])]
    assert reward_figures.figures("process", steps, [[0.5, -0.5]])["accuracy"] == 1
    both = [JudgedRow([1], [[2], [3]], values=[1.0, 0.0])] * 4
    found = reward_figures.figures("label", both, [[5.0, 4.0]] * 4)
    assert found["accuracy"] == 1  # of the pairs, not of the labels


def test_wilson_by_its_definition():
    low, high = reward_figures.wilson_interval(57, 100)
    for bound in (low, high):  # the share from which 57% is 1.96 standard errors away
        assert abs(bound - 0.57) == pytest.approx(reward_figures.NORMAL_95 * math.sqrt(bound * (1 - bound) / 100))
    assert reward_figures.wilson_interval(0, 10)[0] == pytest.approx(0)


def test_ranks_share_their_places():
    assert reward_figures.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


def test_calibration_by_bins():
    probabilities, outcomes = np.array([0.05, 0.07, 0.95, 1.0]), np.array([0, 1, 1, 1])
    assert reward_figures.calibration(probabilities, outcomes) == [
        (pytest.approx(0.06), 0.5, 2),
        (pytest.approx(0.975), 1.0, 2),
    ]
    assert reward_figures.calibration_error(probabilities, outcomes) == pytest.approx((0.44 + 0.025) / 2)


@pytest.mark.parametrize("form", ["pairs", "label", "ordinal", "score", "process", "ranking"])
def test_pictures_are_whole_svg(form):
    import xml.etree.ElementTree as ElementTree

    rows = {
        "pairs": [pair(), pair()],
        "ranking": [JudgedRow([1], [[2], [3], [4]])] * 2,
        "process": [JudgedRow([1], [[2, 2]], step_ends=[0, 1], step_labels=[1.0, 0.0])] * 2,
        "ordinal": [JudgedRow([1], [[2]], values=[2.0])] * 2,
    }.get(form, [JudgedRow([1], [[2]], values=[1.0])] * 2)
    count = {"pairs": 2, "ranking": 3, "process": 2}.get(form, 1)
    kind, scores = "label" if form == "ordinal" else form, [[0.5] * count, [-1.0] * count]
    drawn = pictures(kind, rows, scores, binary=form != "ordinal")
    assert ("calibration.svg" in drawn) == (form not in ("score", "ordinal"))
    for text in drawn.values():
        ElementTree.fromstring(text)
