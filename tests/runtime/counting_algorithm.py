"""A small algorithm that uses runtime/ as a wing does, and child processes that run it and can be killed.

It fits a few weights, some of them bfloat16, to numbers drawn from every global generator: whatever a checkpoint
forgets shows in its metrics.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
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
        for _ in self.steps():
            pass
        return self

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


# Children are forked from a server that has imported already what takes seconds (torch._dynamo comes with the first use
# of an optimiser).
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["taurl.runtime.run", "taurl.runtime.optimization", "torch._dynamo", "tensorboard.summary.writer.record_writer"]
)


class Child:
    """A process that runs a function; its exit code and its standard error are what a command line's would be."""

    def __init__(self, function: Callable[..., None], *arguments: Any):
        self.said, writes = CONTEXT.Pipe(duplex=False)  # a pipe, which no limit on files stops
        self.process = CONTEXT.Process(target=_child, args=(writes, function, arguments), daemon=True)
        self.process.start()
        writes.close()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 30) -> tuple[int, str]:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        with open(self.said.fileno(), "rb", closefd=False) as file:
            return self.process.exitcode, file.read().decode()


def _child(writes: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for stream in (1, 2):
        os.dup2(writes.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    code = 0
    try:
        function(*arguments)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = getattr(error, "exit_code", 99)
        print(f"taurl: {error}", file=sys.stderr) if code != 99 else traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(path: Path, count: int, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while lines_of(path) < count:
        assert time.monotonic() < deadline, f"{path} has {lines_of(path)} lines, not {count}, after {timeout} s"
        time.sleep(0.002)
