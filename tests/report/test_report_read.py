"""What is read from a run directory, whole or damaged, and which samples are chosen."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_run import json_lines, sample, training_record

from taurl.report.read import PICTURE_BYTES, read_run
from taurl.report.samples import TEXT_LIMIT, as_text, choose, shorten
from taurl.runtime.errors import InputError

MakeRun = Callable[..., Path]


def test_records_of_one_step_are_merged_and_sorted(make_run: MakeRun):
    run = read_run(make_run())
    assert list(run.metrics) == [0, 1, 2, 3, 4]
    assert run.metrics[0] == {"eval/rewards/last_number/mean": 0.24, "eval/reward": 0.24}
    assert run.metrics[4]["reward"] == pytest.approx(0.4)
    assert run.points("eval/reward") == [(0, 0.24), (4, 0.7)]
    assert run.notices == []


def test_values_that_are_no_finite_numbers_are_dropped(make_run: MakeRun):
    lines = '{"step": 1, "reward": NaN, "kl": null, "note": "x", "flag": true, "loss": Infinity, "entropy": 1}\n'
    assert read_run(make_run(metrics_jsonl=lines)).metrics == {1: {"entropy": 1.0}}


def test_cut_last_line_is_left_out_and_named(make_run: MakeRun):
    whole = json_lines(training_record(step) for step in (1, 2, 3))
    run = read_run(make_run(metrics_jsonl=whole[:-20]))
    assert list(run.metrics) == [1, 2]
    assert [notice for notice in run.notices if "metrics.jsonl" in notice and "last line, 3" in notice]


def test_bad_lines_in_the_middle_are_counted_and_located(make_run: MakeRun):
    lines = '{"step": 1, "reward": 1}\nnonsense\n[1]\n{"reward": 2}\n{"step": "3"}\n{"step": NaN}\n{"step": 2}\n'
    run = read_run(make_run(metrics_jsonl=lines))
    assert list(run.metrics) == [1, 2]
    (notice,) = run.notices
    assert "5 of 7 lines" in notice
    assert "line 2, 3, 4, 5, 6" in notice


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl"])
def test_a_missing_file_is_named_and_the_rest_is_read(make_run: MakeRun, name: str):
    run = read_run(make_run(**{name.replace(".", "_"): None}))
    (notice,) = run.notices
    assert notice.startswith(f"{name} is missing")
    assert [bool(part) for part in (run.config, run.environment, run.metrics, run.samples.shown)].count(False) == 1


@pytest.mark.parametrize(("rows", "missed"), [(0, 0), (5, 1)])
def test_supervised_training_that_generates_nothing_misses_no_samples(make_run: MakeRun, rows: int, missed: int):
    run = read_run(make_run(samples_jsonl=None, config_yaml=f"generate_rows: {rows}\n"))
    assert sum("samples.jsonl is missing" in notice for notice in run.notices) == missed


@pytest.mark.parametrize(
    ("rewards", "given", "missed"), [("[]", [], 0), ("[last_number]", [], 1), ("[]", ["dataset", "rewards"], 1)]
)
def test_pairs_that_are_given_are_no_samples(make_run: MakeRun, rewards: str, given: list[str], missed: int):
    facts = json.dumps({"algorithm": "dpo", "given_from_python": given})
    run = read_run(make_run(samples_jsonl=None, config_yaml=f"rewards: {rewards}\n", environment_json=facts))
    assert sum("samples.jsonl is missing" in notice for notice in run.notices) == missed


def test_a_run_that_ended_early_says_why_and_is_not_finished(make_run: MakeRun):
    """Though its last step is there, and a result: its last callback had failed."""
    reason = "ZeroDivisionError: division by zero"
    run = make_run(environment_json=json.dumps({"algorithm": "ppo", "ended": reason}))
    (run / "final").mkdir(exist_ok=True)
    found = read_run(run)
    assert not found.finished
    assert found.notices == [f"The run ended early: {reason}"]
    assert found.environment == {"algorithm": "ppo"}


@pytest.mark.parametrize(("facts", "finished"), [({}, False), ({"stopped": "enough"}, True)])
def test_a_run_that_needs_no_more_steps_is_finished_and_says_why(
    make_run: MakeRun, facts: dict[str, str], finished: bool
):
    run = make_run(environment_json=json.dumps({"algorithm": "sft", **facts}), config_yaml="steps: 9\n")
    (run / "final").mkdir(exist_ok=True)
    found = read_run(run)
    assert found.finished == finished
    assert ("The run stopped before its last step: enough" in found.notices) == finished


@pytest.mark.parametrize(
    ("changes", "word"), [({"config_yaml": "a: [1"}, "config.yaml"), ({"environment_json": "[1]"}, "mapping")]
)
def test_unreadable_settings_are_said(make_run: MakeRun, changes: dict[str, str], word: str):
    run = read_run(make_run(**changes))
    (notice,) = run.notices
    assert word in notice


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder"])
def test_what_is_no_run_directory_is_refused_in_one_line(tmp_path: Path, kind: str):
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(InputError) as caught:
        read_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_are_the_same_rows_before_and_after(make_run: MakeRun):
    first = [sample(0, "evaluation", row, f"before {row}") for row in (3, 1, 2)]
    last = [sample(9, "evaluation", row, f"after {row}") for row in (2, 3)]
    samples = read_run(make_run(samples_jsonl=json_lines(first + last))).samples
    assert [(before["completion"], after["completion"]) for before, after in samples.pairs] == [
        ("before 3", "after 3"),
        ("before 2", "after 2"),
    ]
    assert samples.pair_steps == (0, 9)


def test_one_evaluation_alone_makes_no_pair(make_run: MakeRun):
    assert read_run(make_run(samples_jsonl=json_lines([sample(0, "evaluation", 1, "x")]))).samples.pairs == []


def test_many_samples_are_thinned_over_all_steps_within_the_budget(make_run: MakeRun):
    everything = [sample(step, "train", row, "word " * 300) for step in range(40) for row in range(100)]
    samples = read_run(make_run(samples_jsonl=json_lines(everything))).samples
    assert samples.total == 4000
    assert {entry["step"] for entry in samples.shown} == set(range(40))
    assert 300_000 < sum(len(entry["completion"]) for entry in samples.shown) < 800_000


def test_choose_gives_what_small_groups_leave_to_the_large_ones():
    groups = [[(step * 100 + index, 1) for index in range(size)] for step, size in enumerate([2, 50, 50])]
    chosen = choose(groups, 12)
    assert [sum(entry[0] // 100 == step for entry in chosen) for step in range(3)] == [2, 5, 5]
    assert (100, 1) in chosen  # the first ones of a group
    assert choose([[(step, 1)] for step in range(11)], 3) == [(0, 1), (5, 1), (10, 1)]


def test_long_texts_keep_their_beginning_and_their_end():
    text = "a" * 5_000 + "the answer is 7"
    short = shorten(text)
    assert len(short) < TEXT_LIMIT + 60
    assert short.startswith("aaa")
    assert short.endswith("the answer is 7")
    assert "3,015 characters left out" in short


def test_messages_are_shown_as_text():
    assert as_text([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]) == (
        "user: hi\nassistant: ho"
    )


def test_pictures_are_inlined_and_too_large_ones_named(make_run: MakeRun):
    directory = make_run()
    (directory / "artifacts" / "deep").mkdir(parents=True)
    (directory / "artifacts" / "deep" / "a.svg").write_text("<svg/>")
    (directory / "artifacts" / "large.png").write_bytes(b"x" * (PICTURE_BYTES + 1))
    (directory / "artifacts" / "video.mp4").write_bytes(b"x")
    run = read_run(directory)
    assert [(picture.name, picture.uri) for picture in run.pictures] == [
        ("deep/a.svg", "data:image/svg+xml;base64,PHN2Zy8+")
    ]
    assert [notice for notice in run.notices if "large.png" in notice]
