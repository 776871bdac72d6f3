"""Which charts a run gets, and that plotly accepts them."""

import json
import re

import numpy as np
import plotly.graph_objects
import pytest
from report_run import evaluation_record, training_record

from taurl.report.charts import MAXIMUM_POINTS, Chart, sections, thin
from taurl.report.read import RunRecord


def record(*steps: dict) -> RunRecord:
    metrics: dict[int, dict[str, float]] = {}
    for values in steps:
        numbers = {name: value for name, value in values.items() if name != "step" and value is not None}
        metrics.setdefault(values["step"], {}).update(numbers)
    return RunRecord("demo", finished=False, metrics=metrics)


def charts(run: RunRecord) -> dict[tuple[str, str], Chart]:
    return {(section.title, chart.title): chart for section in sections(run) for chart in section.charts}


def test_every_metric_is_drawn_exactly_once():
    run = record(evaluation_record(0, 0.2), *(training_record(step) | {"new": 1.0, "a/b/c": 2.0} for step in (1, 2)))
    lines = [trace for chart in charts(run).values() for trace in chart.figure["data"] if "name" in trace]
    # apart from the wall clock, the spread that is also a band, and the one reward function that equals the total twice
    assert len(lines) == len(run.metric_names) - 3


def test_unknown_metrics_are_grouped_by_prefix():
    run = record(
        {
            "step": 5,
            "probe/first": 20.0,
            "probe/second": 21.0,
            "other/approx": 0.1,
            "eval/new": 900.0,
        },
        {"step": 6, "probe/first": 30.0, "lonely": 1.0},
    )
    assert list(charts(run)) == [
        ("probe", "first"),
        ("probe", "second"),
        ("other", "approx"),
        ("Held-out evaluation", "eval/new"),
        ("Others", "lonely"),
    ]
    assert charts(run)["probe", "first"].summary == "first: 20 at step 5, 30 at step 6"


def acting_record(step: int) -> dict:
    return {
        "step": step,
        "seconds": 1.0 * step,
        "loss": 2.0,
        "train/approx_kl": 0.01,
        "train/new": 3.0,
        "rollout/ep_rew_mean": 20.0 + step,
        "rollout/ep_len_mean": 21.0,
        "time/fps": 900.0,
        "time/update": 0.2,
        "time/step": 0.3,
        "eval/mean_reward": 40.0 + step,
        "eval/std_reward": 5.0,
        "eval/reward_p10": 30.0,
        "eval/reward_p50": 41.0,
        "eval/reward_p90": 60.0,
        "eval/mean_ep_length": 40.0,
    }


def test_a_run_that_acts_is_drawn_return_first_over_environment_steps():
    run = record(*map(acting_record, (1000, 2000)))
    run.config["env"] = "CartPole-v1"
    found = charts(run)
    assert list(found) == [
        ("Return", "Evaluation"),
        ("Return", "While training"),
        ("Return", "Episode length"),
        ("Policy", "KL"),
        ("Optimisation", "Loss"),
        ("Optimisation", "train/new"),
        ("Speed", "Steps per second"),
        ("Speed", "Time per phase"),
    ]
    low, high, mean = found["Return", "Evaluation"].figure["data"]
    assert (low["y"], high["y"], mean["y"]) == ([30.0, 30.0], [60.0, 60.0], [1040.0, 2040.0])
    assert {chart.figure["layout"]["xaxis"]["title"]["text"] for chart in found.values()} == {"environment steps"}


def test_a_phase_that_did_not_take_place_took_no_time():
    run = record(
        *({"step": step, "time/update": 1.0, **({"time/evaluation": 2.0} if step == 2 else {})} for step in (1, 2, 3))
    )
    for trace in charts(run)["Speed", "Time per phase"].figure["data"]:
        assert trace["stackgaps"] == "infer zero"


def test_the_band_is_one_standard_deviation_around_the_total():
    run = record(*({"step": step, "reward": step / 2, "reward_std": 0.25, "rewards/f/mean": 9.0} for step in (1, 2)))
    low, high, total, function = charts(run)["Reward", "Reward"].figure["data"]
    assert (low["y"], high["y"], high["fill"]) == ([0.25, 0.75], [0.75, 1.25], "tonexty")
    assert (total["y"], function["name"], function["y"]) == ([0.5, 1.0], "f", [9.0, 9.0])


def test_one_reward_function_that_is_the_total_is_drawn_once():
    run = record(*({"step": step, "reward": 1.0 * step, "rewards/f/mean": 1.0 * step} for step in (1, 2)))
    assert [line.label for line in charts(run)["Reward", "Reward"].lines] == ["reward = f"]


def test_phases_are_stacked_and_totals_are_not():
    run = record({"step": 1, "time/sample": 2.0, "time/update": 3.0, "time/fps": 100.0})
    phases = charts(run)["Speed", "Time per phase"].figure["data"]
    assert [(trace["name"], trace["stackgroup"]) for trace in phases] == [("sample", "all"), ("update", "all")]


def test_stacked_lines_of_a_long_run_have_the_same_steps():
    rng = np.random.default_rng(0)
    run = record(*({"step": s, "time/sample": rng.random(), "time/update": rng.random()} for s in range(1, 3000)))
    sample, update = charts(run)["Speed", "Time per phase"].figure["data"]
    assert sample["x"] == update["x"]
    assert 500 <= len(sample["x"]) <= 1000


def test_stacked_lines_keep_their_ends_and_peaks():
    records = [{"step": step, "time/sample": 1.0, "time/update": 2.0} for step in range(1, 5001)]
    records[1233]["time/update"] = 90.0
    sample, update = charts(record(*records))["Speed", "Time per phase"].figure["data"]
    assert sample["x"] == update["x"]
    assert {1, 1234, 5000} <= {*update["x"]}
    assert max(update["y"]) == 90.0
    assert len(update["x"]) <= MAXIMUM_POINTS


def test_a_single_point_shows_as_a_marker():
    for chart in charts(record(training_record(1))).values():
        assert all("markers" in trace["mode"] for trace in chart.figure["data"])


def test_more_lines_than_colours_are_split():
    run = record({"step": 1, **{f"rewards/f{index}/mean": float(index) for index in range(11)}})
    found = charts(run)
    assert [len(found["Reward", title].lines) for title in ("Reward", "Reward (2)")] == [8, 3]


def test_names_cannot_bring_markup_into_plotly():
    (chart,) = charts(record({"step": 1, "rewards/<b>&/mean": 1.0})).values()
    assert chart.figure["data"][0]["name"] == "&lt;b&gt;&amp;"


@pytest.mark.parametrize("length", [1, 2, MAXIMUM_POINTS, MAXIMUM_POINTS + 1, 50_001])
def test_thinning_keeps_ends_peaks_and_order(length: int):
    points = [(step, 0.0) for step in range(length)]
    peak = length // 3
    points[peak] = (peak, 7.0)
    kept = thin(points)
    assert len(kept) <= MAXIMUM_POINTS
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert points[peak] in kept
    assert kept == sorted(kept)


def test_plotly_accepts_every_figure():
    run = record(evaluation_record(0, 0.2), *(training_record(step) | {"loss": -1.0} for step in (1, 2, 3)))
    for figure in [chart.figure for chart in charts(run).values()]:
        coloured = json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "#123456", json.dumps(figure)))
        plotly.graph_objects.Figure(coloured)  # raises on an unknown property or value
