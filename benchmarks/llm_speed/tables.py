"""Tables, pictures and the verdict of a benchmark of two sides, and its section of RESULTS.md."""

import datetime
import platform
import sys
from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from llm_speed.sides import INSTALLED, OURS, Found, Job, median_seconds, peak_gb
from shared import HERE, write_section
from taurl.runtime.machine import describe_machine, matrix_product_seconds

PEAK_SIZE = 2048
PASS_FLOPS = 6  # of a parameter and a token: two forwards, four backwards (a product and its two gradients)


@dataclass(frozen=True)
class Target:
    """What a row of the benchmarks must reach.

    Attributes:
        speed: how many times faster than each peer, by its name.
        memory: taurl's peak over the peer's as installed, at most.
    """

    speed: dict[str, float]
    memory: float = 1 / 2


def table(found: dict[str, list[Found]], target: Target) -> str:
    """Seconds and memory of each side, what taurl gains, what was asked for."""
    lines = ["| | s a step | of | peak GB | taurl's speed | asked | taurl's memory | asked |", "|---|---|---|---|---|---|---|---|"]
    ours = found[OURS]
    for name, runs in found.items():
        count = sum(len(run["seconds"]) for run in runs)
        cells = [name, f"{median_seconds(runs):.1f}", str(count), f"{peak_gb(runs):.1f}"]
        if name != OURS:
            faster, smaller = median_seconds(runs) / median_seconds(ours), peak_gb(ours) / peak_gb(runs)
            cells += [f"{faster:.2f} ×", f"≥ {target.speed[name]:g} ×" if name in target.speed else ""]
            cells += [f"{smaller:.2f} ×", f"≤ {target.memory:.2g} ×" if name == INSTALLED else ""]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def missed(found: dict[str, list[Found]], target: Target) -> list[str]:
    """The targets that were not reached, each in words."""
    ours, said = found[OURS], []
    for name, asked in target.speed.items():
        if name in found and (ratio := median_seconds(found[name]) / median_seconds(ours)) < asked:
            said.append(f"{ratio:.2f} times the speed of {name}, {asked:g} asked")
    if INSTALLED in found and (ratio := peak_gb(ours) / peak_gb(found[INSTALLED])) > target.memory:
        said.append(f"{ratio:.2f} of the memory of {INSTALLED}, {target.memory:.2g} asked")
    return said


def pass_flops(run: Found, tokens: float, targets: float) -> float:
    """Of the matrix products that an update cannot do without: the body at every token, the head at the targets."""
    return PASS_FLOPS * (run["body_parameters"] * tokens + run["head_parameters"] * targets)


def share_of_peak(job: Job, flops: float, found: dict[str, list[Found]]) -> str:
    """How near taurl's step is to the machine's matrix products, and what that leaves to gain on the peers."""
    least = flops / matrix_product_peak(job)
    bounds = [f"{median_seconds(runs) / least:.1f} times the speed of {name}" for name, runs in found.items() if name != OURS]
    return (
        f"Its matrix products are {flops / 1e12:.2f} TFLOP a step, the body at every token and the head at the targets. At "
        f"{flops / least / 1e12:.2f} TFLOP/s, what a product of {PEAK_SIZE}³ reaches here in {job['precision']}, they take "
        f"{least:.1f} s, {least / median_seconds(found[OURS]):.0%} of taurl's step."
        + (f" A step of nothing else would have {' and '.join(bounds)}." if bounds else "")
    )


def matrix_product_peak(job: Job) -> float:
    """FLOP/s of the best of some square matrix products."""
    import torch

    seconds = matrix_product_seconds(getattr(torch, job["precision"]), torch.device(job["device"]), PEAK_SIZE)
    return 2 * PEAK_SIZE**3 / seconds


def about(job: Job) -> str:
    """The command, the day, the versions and the machine, in one line."""
    machine = describe_machine()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    where = machine["gpu"] if job["device"] == "cuda" else f"{machine['cpu']}, {job['threads']} threads"
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"`{command}`, {datetime.date.today()}; trl 1.16.0, {packages}, Python {platform.python_version()}; {where}; "
        f"{job['precision']}."
    )


def finish(
    options: Namespace, title: str, job: Job, found: dict[str, list[Found]], target: Target, *notes: str
) -> None:
    """Print the result, with what was missed; with --write it becomes a section of RESULTS.md, and a picture."""
    text = [about(job), table(found, target)]
    if said := missed(found, target):
        text.append(f"Missed: {'; '.join(said)}.")
    text += [note for note in notes if note]
    if options.write and len(found) > 1:
        picture = f"{Path(sys.argv[0]).stem}.svg"
        bars(HERE / picture, title, found)
        text.insert(1, f"![{title}]({picture})")
        write_section(title, "\n\n".join(text))
    print(f"## {title}", *text, sep="\n\n")


def bars(path: Path, title: str, found: dict[str, list[Found]]) -> None:
    """Seconds a step and peak memory of each side, as bars."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "taurl"})
    figure, axes = plt.subplots(1, 2, figsize=(8, 0.6 + 0.5 * len(found)), sharey=True)
    names = list(found)[::-1]
    for axis, measure, label in zip(axes, (median_seconds, peak_gb), ("seconds a step", "peak memory, GB"), strict=True):
        drawn = axis.barh(names, [measure(found[name]) for name in names], color=["#94a3b8"] * (len(names) - 1) + ["#2563eb"])
        axis.bar_label(drawn, fmt="%.1f", padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
