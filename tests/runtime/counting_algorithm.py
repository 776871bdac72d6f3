"""A small algorithm that uses runtime/ as a wing does.

It fits a few weights, some of them bfloat16, to numbers drawn from every global generator: whatever a checkpoint
forgets shows in its metrics.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from taurl.runtime.config import FREE, TrainingConfig, read_config, validated
from taurl.runtime.optimization import Optimizer, learning_rate
from taurl.runtime.run import Record, Run
from taurl.runtime.seeding import seed_everything

HEADLINE = {"loss": "loss"}


class CountingConfig(TrainingConfig):
    """Counts numbers."""

    width: int = 4
    labels: dict[str, Any] = Field(default_factory=dict)
    pause: float = Field(0.0, json_schema_extra=FREE)


class Counter:
    """State beside the optimiser's."""

    def __init__(self):
        self.changes = 0

    def tensors(self):
        return {"count": torch.tensor(self.changes)}

    def load_tensors(self, tensors):
        self.changes = int(tensors["count"])


class Counting:
    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        torch.set_num_threads(1)
        seed_everything(run.config.seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(3, run.config.width, dtype=torch.bfloat16), torch.nn.Linear(run.config.width, 1)
        )
        self.optimizer = Optimizer(self.model.named_parameters(), run.config)
        self.counter = Counter()
        self.before_update: Callable[[int], None] = lambda step: None

    def train(self) -> "Counting":
        with self.run.leaving(self.write):
            for _ in self.steps():
                pass
        return self

    def write(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "count").write_text(str(self.counter.changes))

    def steps(self):
        run, config = self.run, self.config
        with run.begin(optimizer=self.optimizer, counter=self.counter):
            if run.step == 0:
                run.log({"step": 0, "eval/count": self.counter.changes})
            for step in run.steps():
                with step.phase("sample", "drawing"):
                    inputs = torch.randn(6, 3) + random.random() + float(np.random.standard_normal())
                    time.sleep(config.pause)
                self.before_update(step.number)
                rate = learning_rate(step.number, config)
                with self.optimizer.update(rate) as backward:
                    for part in inputs.split(2):
                        hidden = self.model[0](part.bfloat16()).float().tanh()
                        backward((self.model[1](hidden) - part.sum(dim=1, keepdim=True)).square().sum() / len(inputs))
                self.counter.changes += 1
                run.log_samples([{"step": step.number, "drawn": inputs[0].tolist(), "text": "a\u2028b"}])
                yield step.finish(loss=backward.loss, grad_norm=backward.grad_norm, count=self.counter.changes)


def new(out: Path, **settings: Any) -> Counting:
    config = CountingConfig(out=out, **settings)
    return Counting(Run.start(config, algorithm="counting", headline=HEADLINE))


def resumed(directory: Path, /, **settings: Any) -> Counting:
    stored = read_config(directory, CountingConfig)
    config = validated(CountingConfig, {**stored.model_dump(), **settings}, source="test")
    return Counting(Run.resume(directory, config, headline=HEADLINE))


def start_or_resume(out: Path, settings: Record) -> None:
    (resumed(out) if (out / "config.yaml").exists() else new(out, **settings)).train()


def without_times(records: list[Record]) -> list[Record]:
    return [
        {name: value for name, value in record.items() if name != "seconds" and not name.startswith("time/")}
        for record in records
    ]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(path: Path, count: int, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while lines_of(path) < count:
        assert time.monotonic() < deadline, f"{path} has {lines_of(path)} lines, not {count}, after {timeout} s"
        time.sleep(0.002)
