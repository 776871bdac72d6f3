"""Every preset of the control wing against its reference score: three seeds each, by the commands a user would type.

    python benchmarks/control_scores.py [ALGORITHM/ENVIRONMENT …] [--seeds 0 1 2] [--runs FOLDER]

Each run is `taurl control ALGORITHM --env ENVIRONMENT --seed SEED --eval-episodes N`; its score is the mean return of
the evaluation that ends it, most likely actions. Runs that are finished are read, not done again, and runs that were
cut off are gone on with; `--runs` is where they lie. Prints the table in Markdown as it grows. On one thread all of it
takes more than an hour.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A preset, the mean return that every seed is to reach, within how many steps, over how many episodes."""

    preset: str
    at_least: float
    steps: int | None
    episodes: int = 100


ROWS = [
    Row("q-learning/FrozenLake-v1", 0.72, None, 10_000),
    Row("q-learning/Taxi-v4", 7.5, None),
    Row("q-learning/CliffWalking-v1", -13, None),
    Row("dqn/CartPole-v1", 490, 50_000),
    Row("dqn/Acrobot-v1", -85, 100_000),
    Row("reinforce/CartPole-v1", 495, 500_000),
    Row("a2c/CartPole-v1", 495, 500_000),
    Row("trpo/CartPole-v1", 500, 100_000),
    Row("trpo/Pendulum-v1", -180, 100_000),
    Row("trpo/Hopper-v5", 3_000, 1_000_000),
    Row("ppo/CartPole-v1", 500, 100_000),
    Row("ppo/Acrobot-v1", -85, 1_000_000),
    Row("ppo/LunarLander-v3", 240, 1_000_000),
    Row("ppo/Pendulum-v1", -180, 100_000),
    Row("ppo/HalfCheetah-v5", 4_000, 1_000_000),
    Row("ppo/Hopper-v5", 2_300, 1_000_000),
    Row("grpo/CartPole-v1", 475, 500_000),
]


def run(row: Row, seed: int, directory: Path) -> tuple[float, int, float]:
    """Score, steps and wall time in seconds of one run, which is done first unless it is there."""
    algorithm, env = row.preset.split("/")
    command = [str(Path(sys.executable).with_name("taurl")), "control", algorithm]
    if not (directory / "report.html").exists():
        if (directory / "config.yaml").exists():
            command += ["--resume", str(directory)]
        else:
            command += ["--env", env, "--seed", str(seed), "--out", str(directory)]
            command += ["--eval-episodes", str(row.episodes)]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(f"{' '.join(command)}\n{found.stderr}")
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "eval/mean_reward" in record][-1]
    return last["eval/mean_reward"], last["step"], records[-1]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="presets, for example ppo/CartPole-v1; all of them by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/scores"))
    options = parser.parse_args()
    if unknown := set(options.rows) - {row.preset for row in ROWS}:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; known: {', '.join(row.preset for row in ROWS)}")
    print("| preset | at least | " + " | ".join(f"seed {seed}" for seed in options.seeds) + " | steps | seconds | |")
    print("|---|---|" + "---|" * len(options.seeds) + "---|---|---|")
    for row in ROWS:
        if options.rows and row.preset not in options.rows:
            continue
        found = [run(row, seed, options.runs / f"{row.preset.replace('/', '-')}-{seed}") for seed in options.seeds]
        scores = " | ".join(f"{score:,.3f}" if abs(row.at_least) < 1 else f"{score:,.1f}" for score, _, _ in found)
        steps, seconds = max(steps for _, steps, _ in found), max(seconds for _, _, seconds in found)
        met = all(score >= row.at_least for score, _, _ in found) and (row.steps is None or steps <= row.steps)
        met = met and (row.steps is not None or seconds <= 60)
        within = f" (of {row.steps:,})" if row.steps else " (60 s)"
        verdict = "met" if met else "not met"
        print(
            f"| {row.preset} | {row.at_least:,} | {scores} | {steps:,}{within} | {seconds:.0f} | {verdict} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
