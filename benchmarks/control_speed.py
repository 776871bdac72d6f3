"""Environment steps a second: taurl against Stable-Baselines3, sb3-contrib and sbx, in turn, in one call.

    python benchmarks/control_speed.py [--rounds 5] [--rows ppo-cartpole …] [--peers FOLDER]

Same environment, network, batch sizes and number of gradient steps, one thread each; medians. Two figures for taurl:
with the peer's way of stepping the environments (one after the other), and with its own best (the environment's own
vector class where it has one). The clock starts after the first 2,048 steps; sbx has compiled its updates by then. The
peers get an environment of their own, as in functional_agreement.py.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import environment

HERE = Path(__file__).resolve().parent / "speed"
ROWS = ["ppo-cartpole", "ppo-halfcheetah", "trpo-cartpole", "dqn-cartpole", "dqn-cartpole-8"]
NO_SBX = ["trpo-cartpole"]  # it has no TRPO


def measure(*command: object) -> float:
    found = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return float(found.stdout.split()[-1])


def to_500(peers: Path, seeds: int) -> None:
    """Wall time from the start of a process until 20 evaluation episodes on CartPole-v1 all give 500."""
    taurl = [Path(sys.executable).with_name("taurl"), "control", "ppo", "--env", "CartPole-v1", "--eval-every", "2048"]
    found: dict[str, list[float]] = {"SB3's tuned preset": [], "taurl's": []}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            ours = [*taurl, "--stop-at", "500", "--no-video", "--seed", seed, "--out", f"{folder}/run"]
            theirs = [peers, "-W", "ignore", HERE / "theirs_to_500.py", seed]
            for seconds, command in zip(found.values(), (theirs, ours), strict=True):
                started = time.perf_counter()
                subprocess.run([str(part) for part in command], capture_output=True, check=True)
                seconds.append(time.perf_counter() - started)
    theirs_median, ours_median = (statistics.median(seconds) for seconds in found.values())
    for name, seconds in found.items():
        print(f"{name}: {', '.join(f'{one:.1f}' for one in seconds)} s, median {statistics.median(seconds):.1f} s")
    print(f"ratio {theirs_median / ours_median:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "taurl" / "peers")
    parser.add_argument("--to-500", action="store_true", help="the wall time to 500 on CartPole-v1 instead, 5 seeds")
    options = parser.parse_args()
    peers = environment(options.peers)
    if options.to_500:
        to_500(peers, 5)
        return
    print("| steps a second | SB3 | sbx | taurl | to SB3 | to sbx | own best | to SB3 | to sbx |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in options.rows:
        found: dict[str, list[float]] = {"sb3": [], "sbx": [], "sync": [], "auto": []}
        for _ in range(options.rounds):
            for kind in ["sb3"] if row in NO_SBX else ["sb3", "sbx"]:
                found[kind].append(measure(peers, "-W", "ignore", HERE / "theirs.py", row, kind))
            for kind in ("sync", "auto"):
                with tempfile.TemporaryDirectory() as folder:
                    found[kind].append(measure(sys.executable, HERE / "ours.py", row, kind, f"{folder}/run"))
        sb3, sbx, sync, own = (statistics.median(found[kind] or [math.nan]) for kind in found)
        cells = [row, *(f"{x:,.0f}" for x in (sb3, sbx, sync)), f"{sync / sb3:.2f}", f"{sync / sbx:.2f}"]
        print(f"| {' | '.join([*cells, f'{own:,.0f}', f'{own / sb3:.2f}', f'{own / sbx:.2f}'])} |", flush=True)


if __name__ == "__main__":
    main()
