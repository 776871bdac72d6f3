"""Tolerant reading of a run directory: whatever is there is kept, whatever is not is noted in words for the page."""

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from taurl.report.lines import read_lines
from taurl.report.samples import Samples, read_samples
from taurl.runtime.errors import InputError

RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl")
PICTURE_TYPES = {
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
PICTURE_BYTES = 600_000  # all pictures together, so that the page stays small beside plotly's script (4.8 MB)

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Picture:
    """A picture under `artifacts/`: its path below that folder, and its content as a data URI."""

    name: str
    uri: str

    @property
    def caption(self) -> str:
        """The name as words, without its suffix."""
        return self.name.rpartition(".")[0].replace("-", " ").replace("_", " ")


@dataclass
class RunRecord:
    """What a run directory says. `metrics[step][name]` holds finite numbers only; `notices` are lines for the page."""

    name: str
    finished: bool
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)
    pictures: list[Picture] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def acts(self) -> bool:
        """Whether the run trains a policy that acts in an environment, and not a language model."""
        return "env" in self.config

    @property
    def step_name(self) -> str:
        """What `step` counts."""
        return "environment steps" if self.acts else "step"

    def points(self, name: str) -> Points:
        """The steps at which a metric has a value, in order, each with that value."""
        return [(step, values[name]) for step, values in self.metrics.items() if name in values]

    @property
    def metric_names(self) -> list[str]:
        """Every metric that has a value somewhere, in the order of first appearance."""
        return list(dict.fromkeys(name for values in self.metrics.values() for name in values))


def read_run(run_directory: Path) -> RunRecord:
    """Read a run directory. Raises InputError if it is missing or holds none of `RUN_FILES`."""
    if not run_directory.is_dir():
        found = "a file" if run_directory.exists() else "nothing"
        raise InputError(f"{run_directory}: found {found} there, expected a run directory such as runs/NAME")
    if not any((run_directory / name).is_file() for name in RUN_FILES):
        raise InputError(
            f"{run_directory}: no run directory, none of {', '.join(RUN_FILES)} is there; give the --out of a run"
        )
    run = RunRecord(run_directory.resolve().name, finished=False)
    run.config = _read_mapping(run_directory / "config.yaml", run.notices)
    run.environment = _read_mapping(run_directory / "environment.json", run.notices)
    for name in RUN_FILES:
        # No text is sampled by a run of the control half, by SFT without generate_rows, nor by DPO on given answers.
        samples = not (run.acts or run.config.get("generate_rows") == 0 or _learns_from_given_answers(run))
        if (samples or name != "samples.jsonl") and not (run_directory / name).is_file():
            run.notices.append(f"{name} is missing, so the parts of this page that come from it are left out.")
    run.metrics = _read_metrics(run_directory / "metrics.jsonl", run.notices)
    # A run that was given more steps still has the `final/` of the fewer ones.
    steps, last = run.config.get("steps"), max(run.metrics, default=0)
    ended, stopped = (run.environment.pop(early, None) for early in ("ended", "stopped"))
    done = not isinstance(steps, int) or last >= steps or stopped is not None
    if ended is not None:
        run.notices.append(f"The run ended early: {ended}")
    elif stopped is not None:
        run.notices.append(f"The run stopped before its last step: {stopped}")
    run.finished = (run_directory / "final").is_dir() and done and ended is None
    run.samples = read_samples(run_directory / "samples.jsonl", run.notices)
    run.pictures = _read_pictures(run_directory / "artifacts", run.notices)
    return run


def _learns_from_given_answers(run: RunRecord) -> bool:
    sampled = run.config.get("rewards") or "rewards" in run.environment.get("given_from_python", ())
    return run.environment.get("algorithm") == "dpo" and not sampled


def _read_mapping(path: Path, notices: list[str]) -> dict[str, Any]:
    """A YAML or JSON file whose top level is a mapping; empty, with a notice, if it is anything else."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        notices.append(f"{path.name} could not be read and is left out: {reason}")
        return {}
    if not isinstance(content, dict):
        notices.append(f"{path.name} is left out: a mapping of names to values was expected at its top.")
        return {}
    return {str(key): value for key, value in content.items()}


def _read_metrics(path: Path, notices: list[str]) -> dict[int, dict[str, float]]:
    """Records by step, ascending. Records of one step are merged, the later line winning; non-numbers are dropped."""
    metrics: dict[int, dict[str, float]] = {}
    for _, _, record in read_lines(path, notices):
        metrics.setdefault(int(record["step"]), {}).update(_finite_numbers(record))
    return dict(sorted(metrics.items()))


def _finite_numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            yield name, float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float
        return False


def _read_pictures(folder: Path, notices: list[str]) -> list[Picture]:
    pictures, left = [], PICTURE_BYTES
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        kind = PICTURE_TYPES.get(path.suffix.lower())
        if kind is None or not path.is_file():
            continue
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if size > left:
            notices.append(f"artifacts/{name} is not shown: its {size / 1e6:.1f} MB would make this page too large.")
            continue
        left -= size
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        pictures.append(Picture(name, f"data:{kind};base64,{content}"))
    return pictures
