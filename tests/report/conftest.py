"""The fixture of the report's tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_run import CONFIG, ENVIRONMENT, evaluation_record, json_lines, sample, training_record


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a run directory; a file given as None is left out, as text written as it is."""

    def make(**changes: str | None) -> Path:
        directory = tmp_path / "demo"
        directory.mkdir()
        training = [training_record(step) for step in range(1, 5)]
        samples = [sample(0, "evaluation", row, f"before {row}") for row in range(5)]
        samples += [sample(step, "train", row, f"try {step}.{row}", 0.5) for step in range(1, 5) for row in range(3)]
        samples += [sample(4, "evaluation", row, f"after {row}", 1.0) for row in range(5)]
        files = {
            "config_yaml": CONFIG,
            "environment_json": json.dumps(ENVIRONMENT),
            "metrics_jsonl": json_lines([evaluation_record(0, 0.24), *training, evaluation_record(4, 0.7)]),
            "samples_jsonl": json_lines(samples),
            **changes,
        }
        for name, text in files.items():
            if text is not None:
                (directory / name.replace("_", ".")).write_text(text, encoding="utf-8")
        return directory

    return make
