"""Environment steps a second: taurl against Stable-Baselines3 and sb3-contrib, in turn, in one call.

    python benchmarks/control_speed.py [--rounds 5] [--rows ppo-cartpole …] [--peers FOLDER]

Same environment, network, batch sizes and number of gradient steps, one thread each; medians. Two figures for taurl:
with the peer's way of stepping the environments (one after the other), and with its own best (the environment's own
vector class where it has one). The clock starts after the first 2,048 steps; sbx has compiled its updates by then. The
peers get an environment of their own, as in functional_agreement.py.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from functional_agreement import environment

HERE = Path(__file__).resolve().parent / "speed"
ROWS = ["ppo-cartpole", "ppo-halfcheetah", "trpo-cartpole", "dqn-cartpole"]


def measure(*command: object) -> float:
    found = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return float(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "taurl" / "peers")
    options = parser.parse_args()
    peers = environment(options.peers)
    print(f"{'':<18}{'peer':>10}{'taurl':>10}{'ratio':>7}{'own best':>10}{'ratio':>7}")
    for row in options.rows:
        found: dict[str, list[float]] = {"peer": [], "sync": [], "auto": []}
        for _ in range(options.rounds):
            found["peer"].append(measure(peers, "-W", "ignore", HERE / "theirs.py", row))
            for kind in ("sync", "auto"):
                with tempfile.TemporaryDirectory() as folder:
                    found[kind].append(measure(sys.executable, HERE / "ours.py", row, kind, f"{folder}/run"))
        peer, sync, own = (statistics.median(found[kind]) for kind in ("peer", "sync", "auto"))
        print(f"{row:<18}{peer:>10,.0f}{sync:>10,.0f}{sync / peer:>7.2f}{own:>10,.0f}{own / peer:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
