"""Settings: YAML and back, errors in one line, and which of them a resumed run may change."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError, model_validator

from taurl.runtime.config import FREE, TrainingConfig, free_on_resume, read_config, read_yaml, validated
from taurl.runtime.errors import InputError


class Settings(TrainingConfig):
    """Some more settings."""

    words: tuple[str, ...] = ()
    mapping: dict[str, Any] = Field(default_factory=dict)
    pace: int = Field(1, json_schema_extra=FREE)

    @model_validator(mode="after")
    def _fit(self):
        if self.pace > self.steps:
            raise ValueError(f"pace {self.pace} exceeds steps {self.steps}")
        return self


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_yaml_round_trip(tmp_path):
    config = Settings(
        out=Path("runs/größe"),
        learning_rate=3e-5,
        adam_betas=(0.9, 0.95),
        max_grad_norm=math.inf,
        threads=None,
        words=("a: b", "# c", "", "line\nbreak"),
        mapping={"nested": {"list": [1, 2.5, None, True]}, "text": "1e-5"},
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert validated(Settings, read_yaml(path), source="x") == config
    assert read_config(tmp_path, Settings) == config
    assert "größe" in path.read_text(encoding="utf-8")


def test_yaml_with_plain_exponents_and_comments(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("# only comments so far\n")
    assert read_yaml(path) == {}
    path.write_text("learning_rate: 1e-5   # YAML 1.1 reads this as text\nsteps: 7\n")
    config = validated(Settings, read_yaml(path), source="x")
    assert (config.learning_rate, config.steps) == (1e-5, 7)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"learning_rat": 1}, "x: unknown setting learning_rat; did you mean learning_rate?"),
        ({"steps": 0}, "x: steps is 0: Input should be greater than or equal to 1"),
        ({"learning_rate": "inf"}, "x: learning_rate is 'inf': Input should be a finite number"),
        ({"steps": "many"}, "x: steps is 'many': Input should be a valid integer"),
        ({"schedule": "steep"}, "x: schedule is 'steep': Input should be 'constant', 'linear' or 'cosine'"),
        ({"adam_betas": [0.9, 1.5]}, "x: adam_betas.1 is 1.5: Input should be less than 1"),
        ({"seed": 2**63}, f"x: seed is {2**63}: Input should be less than {2**63}"),
        ({"pace": 3, "steps": 2}, "x: pace 3 exceeds steps 2"),
    ],
)
def test_one_line_names_the_setting_what_was_found_and_what_was_expected(values, expected):
    with pytest.raises(InputError) as error:
        validated(Settings, values, source="x")
    assert message(error).startswith(expected)


def test_an_unknown_setting_without_a_neighbour_lists_those_there_are():
    with pytest.raises(InputError) as error:
        validated(Settings, {"zzz": 1}, source="x")
    assert "unknown setting zzz; known: adam_betas, " in message(error)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"steps: [1\n", "not valid YAML"),
        (b"out: 2026-02-30\n", "not valid YAML: "),  # would be a date
        (b"- steps\n", "expected `setting: value` lines, found list"),
        (b"false\n", "expected `setting: value` lines, found bool"),
        (b"steps: \xff\n", "cannot read the settings"),
        (b"1: 2\n", "unknown setting 1"),
    ],
)
def test_a_file_that_holds_no_settings(tmp_path, content, expected):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        validated(Settings, read_yaml(path), source=str(path))
    assert str(path) in message(error)
    assert expected in message(error)


def test_missing_file_folder_and_run_directory(tmp_path):
    with pytest.raises(InputError, match="cannot read the settings: No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read the settings: Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(InputError, match=r"not a run directory: config\.yaml is missing"):
        read_config(tmp_path, Settings)


def test_frozen():
    with pytest.raises(ValidationError):
        Settings().steps = 3


def test_free_on_resume():
    free = {name for name in Settings.model_fields if free_on_resume(Settings, name)}
    assert free == {"out", "steps", "stop_after_non_finite", "save_every", "keep_checkpoints", "pace"}


def test_changed_from():
    assert Settings(steps=5, seed=1).changed_from(Settings(steps=6)) == ["seed", "steps"]
    # A tuple within a dictionary comes back from YAML as a list, which is no change.
    config = Settings(mapping={"range": (1, 2)}, words=("a",))
    stored = Settings(mapping={"range": [1, 2]}, words=["a"])
    assert config.changed_from(stored) == []


def test_a_home_directory_is_read_in_out():
    assert TrainingConfig(out="~/runs/a").out == Path.home() / "runs" / "a"
