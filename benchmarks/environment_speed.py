"""Steps a second of random actions, by environment and vectorization.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/environment_speed.py

For each environment and each `vectorization`: 8 copies, through `taurl.control.environments.Environments`, as training
has them; the median of 5 stretches of a second. Prints a table in Markdown. envpool and ale-py are given one
thread each.
"""

import statistics
import time

import numpy as np

from taurl.control.environments import Environments

NAMES = ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v5", "ALE/Pong-v5"]
VECTORIZATIONS = ["auto", "sync", "async", "envpool"]
COPIES, STRETCHES, SECONDS = 8, 5, 1.0


def speed(name: str, vectorization: str) -> float:
    """Steps of all copies in a second."""
    has_threads = vectorization == "envpool" or (name.startswith("ALE/") and vectorization == "auto")
    arguments = {"num_threads": 1} if has_threads else {}
    environments = Environments(name, COPIES, seed=0, arguments=arguments, vectorization=vectorization)
    environments.vector.action_space.seed(0)
    environments.reset()
    actions = [environments.vector.action_space.sample() for _ in range(100)]  # drawing them takes longer than a step
    found = []
    for _ in range(STRETCHES):
        start, steps = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < SECONDS:
            environments.step(np.asarray(actions[steps % len(actions)]))
            steps += 1
        found.append(steps * COPIES / elapsed)
    environments.close()
    return statistics.median(found)


def main() -> None:
    print(f"| | {' | '.join(f'`{one}`' for one in VECTORIZATIONS)} |")
    print(f"|---|{'---:|' * len(VECTORIZATIONS)}")
    for name in NAMES:
        row = [f"{speed(name, one):,.0f}" for one in VECTORIZATIONS]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
