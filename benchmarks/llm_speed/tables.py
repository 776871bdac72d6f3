"""Tables, pictures and the verdict of a benchmark of two sides, and its section of RESULTS.md."""

import datetime
import platform
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm_speed.sides import INSTALLED, OURS, Found, Job, median_seconds, our_side, peak_gb
from shared import HERE, PACKAGES, write_section

from taurl.runtime.machine import describe_machine, matrix_product_seconds

BLUE, GRAY = "#2563eb", "#94a3b8"
PEAK_SIZE = 2048  # rows and columns of the product that the peak is measured with
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
    heads = ["", "s a step", "steps", "peak GB", "taurl's speed", "asked", "taurl's memory", "asked"]
    lines, ours = [heads, ["---"] * len(heads)], found[OURS]
    for name, runs in found.items():
        count = sum(len(run["seconds"]) for run in runs)
        cells = [name, f"{median_seconds(runs):.1f}", str(count), f"{peak_gb(runs):.1f}", *[""] * 4]
        if name != OURS:
            cells[4] = f"{median_seconds(runs) / median_seconds(ours):.2f} ×"
            cells[5] = f"≥ {target.speed[name]:g} ×"
            cells[6] = f"{peak_gb(ours) / peak_gb(runs):.2f} ×"
            cells[7] = f"≤ {target.memory:.2g} ×" if name == INSTALLED else ""
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def missed(found: dict[str, list[Found]], target: Target) -> list[str]:
    """The targets that were not reached, each in words."""
    ours, said = found[OURS], []
    for name, asked in target.speed.items():
        if name in found and (ratio := median_seconds(found[name]) / median_seconds(ours)) < asked:
            said.append(f"{ratio:.2f} times the speed of {name}, {asked:g} asked")
    if INSTALLED in found and (ratio := peak_gb(ours) / peak_gb(found[INSTALLED])) > target.memory:
        said.append(f"{ratio:.2f} of the memory of {INSTALLED}, {target.memory:.2g} asked")
    return said


def verdict(missed: list[str]) -> str:
    """A line on the targets that were not reached; none where all were."""
    return f"Missed: {'; '.join(missed)}." if missed else ""


def pass_flops(run: Found, tokens: float, targets: float) -> float:
    """Of the matrix products that an update cannot do without: the body at every token, the head at the targets."""
    return PASS_FLOPS * (run["body_parameters"] * tokens + run["head_parameters"] * targets)


def share_of_peak(job: Job, flops: float, found: dict[str, list[Found]]) -> str:
    """How near taurl's step is to the machine's matrix products, and what that leaves to gain on the peers."""
    least = flops / matrix_product_peak(job)
    said = (
        f"An update's matrix products, the body at every token and the head at the targets, are {flops / 1e12:.2f} "
        f"TFLOP. At {flops / least / 1e12:.2f} TFLOP/s, what a product of {PEAK_SIZE}³ reaches here in "
        f"{job['precision']}, they take {least:.1f} s, {least / median_seconds(found[OURS]):.0%} of taurl's step."
    )
    peers = {name: median_seconds(runs) / least for name, runs in found.items() if name != OURS}
    bounds = " and ".join(f"{ratio:.1f} times the speed of {name}" for name, ratio in peers.items())
    return f"{said} A step of nothing else would have {bounds}." if bounds else said


def matrix_product_peak(job: Job) -> float:
    """FLOP/s of the best of some square matrix products."""
    import torch

    seconds = matrix_product_seconds(getattr(torch, job["precision"]), torch.device(job["device"]), PEAK_SIZE)
    return 2 * PEAK_SIZE**3 / seconds


def profile(job: Job) -> str:
    """Where the time of one of taurl's steps goes, by operator."""
    once = job | {"profile": True, "steps": 2, "warm_up": 1, "minutes": 60}
    operators = our_side().run(once)["operators"]
    listed = ", ".join(f"`{name}` {share:.0%}" for name, share in operators)
    return f"Profile of one of taurl's steps, share of the time by operator: {listed}."


def about(job: Job) -> str:
    """The command, the day, the versions and the machine, in one line."""
    machine = describe_machine()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    where = machine["gpu"] if job["device"] == "cuda" else f"{machine['cpu']}, {job['threads']} threads"
    peer = next(package for package in PACKAGES if package.startswith("trl")).replace("==", " ")
    folders = {at + n for at, word in enumerate(sys.argv) if word in ("--peers", "--data") for n in (0, 1)}
    words = [word for at, word in enumerate(sys.argv) if at and at not in folders]  # those of this machine
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *words])
    return (
        f"`{command}`, {datetime.date.today()}; {peer}, {packages}, Python {platform.python_version()}; {where}; "
        f"{job['precision']}."
    )


def finish(
    options: Namespace, title: str, job: Job, found: dict[str, list[Found]], target: Target, *notes: str
) -> None:
    """The result of a comparison of steps: table, what was missed, with a profile, notes, and bars as the picture."""
    said = missed(found, target)
    text = [table(found, target), verdict(said), *notes]
    if said and job["device"] == "cpu":
        text.append(profile(job))
    publish(options, title, job, text, lambda axes: bars(axes, found), panels=2)


def publish(
    options: Namespace, title: str, job: Job, text: list[str], draw: Callable[[Any], None], panels: int = 1
) -> None:
    """Print a result; with --write it becomes a section of RESULTS.md with its picture."""
    title = title if job["device"] == "cpu" else f"{title}, on a GPU"
    text = [about(job), *filter(None, text)]
    print(f"## {title}", *text, sep="\n\n")
    if options.write:
        name = re.sub(r"[^a-z0-9.]+", "_", title.lower()) + ".svg"
        picture(HERE / name, title, draw, panels)
        write_section(title, "\n\n".join([*text, f"![{title}]({name})"]))


def picture(path: Path, title: str, draw: Callable[[Any], None], panels: int) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "taurl"})
    figure, axes = plt.subplots(1, panels, figsize=(8, 2.4 if panels > 1 else 3.6), sharey=True)
    draw(axes)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def bars(axes: Any, found: dict[str, list[Found]]) -> None:
    """Seconds a step and peak memory of each side."""
    names = list(found)[::-1]
    colors = [BLUE if name == OURS else GRAY for name in names]
    for axis, measure, label in zip(axes, (median_seconds, peak_gb), ("seconds a step", "peak GB"), strict=True):
        drawn = axis.barh(names, [measure(found[name]) for name in names], color=colors)
        axis.bar_label(drawn, fmt="%.1f", padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)


def largest_difference(found: dict[str, list[Found]]) -> float:
    """The most that the losses of taurl and of a peer differ on the same batch."""
    pairs = [
        (ours, theirs)
        for name, runs in found.items()
        if name != OURS
        for run in runs
        for ours, theirs in zip(found[OURS][0]["losses"], run["losses"], strict=False)
    ]
    return max(abs(ours - theirs) for ours, theirs in pairs)
