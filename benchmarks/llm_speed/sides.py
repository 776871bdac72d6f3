"""Runs the two sides in turn, in processes of their own, and makes medians and tables of what they print."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_speed.data import GSM8K
from shared import environment

from taurl.runtime.machine import KEEP_FREED_MEMORY, KERNELS_KEPT, choose_device, choose_precision, set_threads

HERE = Path(__file__).resolve().parent
QUIET = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
OURS, INSTALLED, SAME = "taurl", "TRL as installed", "TRL, same allocator"
Job = dict[str, Any]
Found = dict[str, Any]


def parser(about: str, *, steps: int, warm_up: int = 1) -> argparse.ArgumentParser:
    """The options that every one of these benchmarks has."""
    options = argparse.ArgumentParser(description=about)
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--rounds", type=int, default=1, help="times that the sides run in turn, each afresh")
    options.add_argument("--steps", type=int, default=steps, help="updates measured in each run")
    options.add_argument("--warm-up", type=int, default=warm_up, help="updates before them")
    options.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="in all; where they end the update under way is the last, and the first may count",
    )
    options.add_argument("--threads", type=int, help="of each side; by default the cores that it may use")
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    options.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "taurl" / "peers")
    options.add_argument("--data", type=Path, default=GSM8K, help="folder with train.jsonl and test.jsonl of GSM8K")
    options.add_argument("--alone", action="store_true", help="taurl only")
    options.add_argument("--compile-layers", action="store_true", help="in taurl; its warm-up holds that")
    options.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    return options


def common_job(options: argparse.Namespace, model: str) -> Job:
    """What every job says: the machine, the model's folder, how many updates."""
    device = choose_device(options.device)
    precision = str(choose_precision(options.precision, device)).removeprefix("torch.")
    return {
        "device": device.type,
        "precision": precision,
        "threads": set_threads(options.threads),
        "model": model,
        "compile_layers": options.compile_layers,
        "warm_up": options.warm_up,
        "steps": options.warm_up + options.steps,
    }


@dataclass
class Side:
    """One way to run a job.

    Attributes:
        name: as the table calls it.
        script: of this folder.
        python: that runs it.
        allocator: whether the job sets the allocator (taurl always does).
        own: what its job says beside what all say.
    """

    name: str
    script: str
    python: Path
    allocator: bool = False
    own: Job = field(default_factory=dict)

    def run(self, job: Job) -> Found:
        """Run the job in a process of its own. Raises: SystemExit with what it said if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.json"
            mallopt = KEEP_FREED_MEMORY if self.allocator else ()
            path.write_text(json.dumps({**job, **self.own, "folder": folder, "mallopt": mallopt}))
            variables = {**os.environ, **QUIET, "PYTHONPATH": str(HERE.parents[1] / "src")}
            if self.allocator:
                variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = KERNELS_KEPT
            command = [str(self.python), "-W", "ignore", str(HERE / self.script), str(path)]
            done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"{self.name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        figures = [line for line in done.stdout.splitlines() if line.startswith("{")]  # vLLM takes its leave after them
        return json.loads(figures[-1])


def our_side() -> Side:
    return Side(OURS, "ours.py", Path(sys.executable))


def sides(options: argparse.Namespace) -> list[Side]:
    """taurl, the peer as installed, and the peer with taurl's allocator settings (on a CPU with glibc)."""
    if options.alone:
        return [our_side()]
    python = environment(options.peers)
    found = [our_side(), Side(INSTALLED, "theirs.py", python)]
    if choose_device(options.device).type == "cpu" and sys.platform == "linux":
        found.append(Side(SAME, "theirs.py", python, allocator=True))
    return found


def in_turn(options: argparse.Namespace, job: Job, among: list[Side] | None = None) -> dict[str, list[Found]]:
    """What each side printed in each round, taurl and TRL by default; each has the same share of the minutes."""
    among, rounds = among or sides(options), options.rounds
    job = {**job, "minutes": options.minutes / len(among) / rounds}
    found: dict[str, list[Found]] = {side.name: [] for side in among}
    for number in range(rounds):
        for side in among:
            found[side.name].append(side.run(job))
            said = {key: value for key, value in found[side.name][-1].items() if key != "losses"}
            print(f"round {number + 1}, {side.name}: {json.dumps(said)}", file=sys.stderr, flush=True)
    return found


def median_seconds(found: list[Found]) -> float:
    return statistics.median(second for one in found for second in one["seconds"])


def peak_gb(found: list[Found]) -> float:
    return max(one["peak_gb"] for one in found)
