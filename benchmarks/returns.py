"""Generalized advantage estimation: the blocked scan against a step at a time, in one run, on one thread.

    python benchmarks/returns.py

Prints milliseconds, the median of five after one to warm up, and the largest relative difference of the two. The plain
loop is the recursion as it is written, a step of all environments at once.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from taurl.functional.returns import generalized_advantage

SHAPES = [(2_048, 256), (65_536, 8)]  # steps, environments
DISCOUNT, TRACE_DECAY = 0.99, 0.95


def step_loop(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor) -> Tensor:
    bootstraps = DISCOUNT * (~terminated).float()
    decays = DISCOUNT * TRACE_DECAY * (~(terminated | truncated)).float()
    errors = rewards + bootstraps * next_values - values
    advantages, following = torch.empty_like(errors), torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = advantages[t] = errors[t] + decays[t] * following
    return advantages


def median_milliseconds(work: Callable[[], Tensor], rounds: int = 5) -> float:
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one thread, float32")
    for steps, environments in SHAPES:
        floats = torch.randn(3, steps, environments)
        ends = torch.rand(2, steps, environments) < 0.005
        by_scan = partial(generalized_advantage, *floats, *ends, discount=DISCOUNT, trace_decay=TRACE_DECAY)
        by_step = partial(step_loop, *floats, *ends)
        difference = ((by_scan() - by_step()).abs().max() / by_step().abs().max()).item()
        scan, loop = median_milliseconds(by_scan), median_milliseconds(by_step)
        print(
            f"{steps:6} steps × {environments:3} environments   scan {scan:6.2f} ms   step loop {loop:7.2f} ms   "
            f"ratio {loop / scan:5.1f}   difference {difference:.0e}"
        )


if __name__ == "__main__":
    main()
