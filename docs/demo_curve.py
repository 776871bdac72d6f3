"""Draws the demo's curves for the README from run directories:

python docs/demo_curve.py docs/demo-curve.svg runs/seed-0 runs/seed-1
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

WINDOW = 5  # steps that the training reward is averaged over


def main(target: str, *directories: str) -> None:
    plt.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "taurl"})
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for color, directory in zip(("#2563eb", "#d97706", "#059669"), map(Path, directories), strict=False):
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        held_out = [(r["seconds"], r["eval/reward"]) for r in records if r.get("eval/reward") is not None]
        training = [(r["seconds"], r["reward"]) for r in records if r.get("reward") is not None]
        smooth = [sum(y for _, y in training[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW)
                  for i in range(len(training))]  # fmt: skip
        axis.plot([x for x, _ in training], smooth, color=color, alpha=0.35, linewidth=1)
        axis.plot(*zip(*held_out, strict=True), color=color, marker="o", markersize=4, label=directory.name)
    axis.set(xlabel="wall time (s)", ylabel="accuracy", ylim=(0, 1), xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, title="held-out, greedy (thin: training samples)", loc="lower right")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
