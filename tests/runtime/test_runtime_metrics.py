"""JSON lines and TensorBoard events on disk."""

import datetime
import json
import math
import resource
import signal

import numpy as np
import pytest
import torch
from processes import Child
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taurl.runtime.errors import RunError
from taurl.runtime.metrics import TensorBoard, append_lines, cut_after, read_lines


def test_values_survive_and_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "lines.jsonl"
    record = {"step": 1, "x": math.nan, "y": [math.inf, 0.1], "z": {"deep": -math.inf}, "n": np.float64(0.3), "t": "é"}
    append_lines(path, [record])
    append_lines(path, [{"step": 2}])
    assert read_lines(path) == [
        {"step": 1, "x": None, "y": [None, 0.1], "z": {"deep": None}, "n": 0.3, "t": "é"},
        {"step": 2},
    ]
    assert "é" in path.read_text(encoding="utf-8")
    assert read_lines(tmp_path / "none.jsonl") == []


def test_values_that_json_does_not_know(tmp_path):
    record = {
        "step": np.int64(1),
        "single": np.float32(0.5),
        "infinite": np.float32("inf"),
        "array": np.array([[1.0, math.nan]]),
        "tensor": torch.tensor([True, False]),
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
        "day": datetime.date(2024, 5, 6),
    }
    append_lines(tmp_path / "lines.jsonl", [record])
    assert read_lines(tmp_path / "lines.jsonl") == [
        {
            "step": 1,
            "single": 0.5,
            "infinite": None,
            "array": [[1.0, None]],
            "tensor": [True, False],
            "half": 1.5,
            "day": "2024-05-06",
        }
    ]


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d\x0be", "a\nb\r\nc", "lone \ud800 surrogate", '"\\'])
def test_any_text_reads_back(tmp_path, text):
    path = tmp_path / "samples.jsonl"
    append_lines(path, [{"step": 1, "text": text}, {"step": 2, "text": "after"}])
    path.read_text(encoding="utf-8")  # is valid UTF-8
    cut_after(path, 2)
    assert read_lines(path) == [{"step": 1, "text": text}, {"step": 2, "text": "after"}]


def test_cut_keeps_whole_lines_up_to_the_step_as_they_are(tmp_path):
    path = tmp_path / "lines.jsonl"
    kept = '{"step": 1,  "spaced": 1.0}\n{"step": 2}\n{"step": 2, "again": 1}\n'
    path.write_text(kept + '{"step": 3}\n{"step": 4, "cut sho')
    assert [record["step"] for record in read_lines(path)] == [1, 2, 2, 3]
    cut_after(path, 2)
    assert path.read_text() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["lines.jsonl"]
    cut_after(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_line_cut_before_its_end_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # killed between the object and the end of its line
    cut_after(path, 2)
    append_lines(path, [{"step": 2, "again": True}])
    assert read_lines(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunError, match=r"lines.jsonl: could not be written \(No such file or directory\)"):
        append_lines(tmp_path / "none" / "lines.jsonl", [{"step": 1}])


def scalars(directory, name):
    events = EventAccumulator(str(directory))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_reads_the_numbers(tmp_path):
    board = TensorBoard(tmp_path / "board")
    board.write({"step": 0, "eval/score": 0.5})
    board.write({"step": 1, "loss": 2.0, "count": 3, "flag": True, "text": "x", "nan": math.nan, "none": None})
    assert scalars(tmp_path / "board", "loss") == {1: 2.0}  # readable while the run goes on
    board.close()
    assert scalars(tmp_path / "board", "eval/score") == {0: 0.5}
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"eval/score", "loss", "count", "flag"}


@pytest.mark.parametrize("again_from", [0, 3])
def test_tensorboard_forgets_what_is_done_again(tmp_path, again_from):
    for part, (first, last) in enumerate([(0, 6), (again_from, 5)]):
        board = TensorBoard(tmp_path, purge_from=first if part else None)
        for step in range(first, last):
            board.write({"step": step, "loss": float(step + 100 * part)})
        board.close()
    expected = {step: float(step + (100 if step >= again_from else 0)) for step in range(5)}
    assert scalars(tmp_path, "loss") == expected


def fill_the_board(directory):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    board = TensorBoard(directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    for step in range(20):
        board.write({"step": step, "loss": 1.0})


def test_full_disk_under_tensorboard_is_one_line(tmp_path):
    code, said = Child(fill_the_board, tmp_path / "board").wait()
    assert code == 1
    assert said.count("\n") == 1
    assert said.startswith(f"taurl: {tmp_path / 'board'}/events.out.tfevents.")
    assert "could not be written (File too large)" in said


def test_lines_are_json_objects(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_lines(path, [{"step": 1, "x": math.inf}])
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name)) == {"step": 1, "x": None}
