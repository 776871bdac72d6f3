"""How the time of sampling grows with length, group, prompt and rows, on SmolLM2-135M-Instruct.

    python benchmarks/sampling_growth.py [--rounds 3] [--picture benchmarks/sampling-growth.svg]

Each curve varies one thing; medians of seconds. No token ends a sequence. Prints a table and draws a picture.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import matplotlib
import torch

matplotlib.use("svg")
import matplotlib.pyplot as plt

from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.models.loading import load_model
from taurl.runtime.machine import choose_precision, describe_machine, keep_freed_memory, set_threads

MODEL = "smollm2-135m-instruct"
SLOTS = 256
LENGTHS, GROUPS = (64, 128, 256, 512, 1024), (1, 2, 4, 8, 16, 32)
PROMPTS, ROWS = (64, 128, 256, 512, 1024, 2048), (1, 4, 16, 64, 256)


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(100, 40_000, (count, length), generator=generator).tolist()


def seconds(sampler: SlotSampler, count: int, length: int, group: int, tokens: int) -> float:
    """Of sampling `group` completions of `tokens` tokens for each of `count` prompts of `length` tokens."""
    start = time.perf_counter()
    sampler.generate(prompts(count, length), group, Sampling(tokens))
    return time.perf_counter() - start


def over_lengths(sampler: SlotSampler) -> list[float]:
    """Seconds until each of LENGTHS, of 8 completions of one prompt: one call, timed on its way."""
    at: list[float] = []
    start = time.perf_counter()
    sampler.generate(
        prompts(1, 64), 8, Sampling(LENGTHS[-1]), progress=lambda *_: at.append(time.perf_counter() - start)
    )
    return [at[length - 2] for length in LENGTHS]  # the first call comes after two tokens


def curves(sampler: SlotSampler) -> dict[str, tuple[tuple[int, ...], Callable[[], list[float]]]]:
    """Each curve's title, its points, and what measures them."""
    return {
        "completion length (1 prompt of 64 × 8)": (LENGTHS, lambda: over_lengths(sampler)),
        "group size (2 prompts of 512, 32 new tokens)": (
            GROUPS,
            lambda: [seconds(sampler, 2, 512, group, 32) for group in GROUPS],
        ),
        "prompt length (1 prompt × 8, 32 new tokens)": (
            PROMPTS,
            lambda: [seconds(sampler, 1, length, 8, 32) for length in PROMPTS],
        ),
        "rows (1 prompt of 64, 16 new tokens)": (ROWS, lambda: [seconds(sampler, 1, 64, rows, 16) for rows in ROWS]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--picture", default="benchmarks/sampling-growth.svg")
    options = parser.parse_args()
    keep_freed_memory()
    threads, dtype = set_threads(None), choose_precision(options.precision, torch.device("cpu"))
    sampler = SlotSampler(load_model(MODEL, dtype=dtype), slots=SLOTS)
    seconds(sampler, 1, 64, 8, 8)  # packs the weights
    print(f"{dtype}, {threads} threads, {describe_machine()['cpu']}, torch {torch.__version__}; seconds\n")
    plt.rcParams.update({"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "taurl"})
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8))
    for axis, (title, (points, measure)) in zip(axes, curves(sampler).items(), strict=True):
        rounds = [measure() for _ in range(options.rounds)]
        found = [statistics.median(values) for values in zip(*rounds, strict=True)]
        print(f"| {title} | {' | '.join(map(str, points))} |")
        print(f"|---|{'---|' * len(points)}")
        print(f"| seconds | {' | '.join(f'{value:.2f}' for value in found)} |\n", flush=True)
        axis.plot(points, found, color="#2563eb", marker="o", markersize=4)
        name, _, rest = title.partition(" (")
        axis.set_title(rest.rstrip(")"), fontsize=8)
        axis.set(xlabel=name, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    figure.tight_layout()
    figure.savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
