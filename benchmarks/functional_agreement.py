"""The mathematics against TRL, Stable-Baselines3 and sb3-contrib: the same numbers through both, one table.

    python benchmarks/functional_agreement.py [--peers FOLDER] [--write]

The first call makes a virtual environment for the peers (a minute or more, 1.5 GB; pip's own configuration says from
where), later ones use it. It is no part of taurl's. `--write` puts the table into RESULTS.md, in place of the last one.
The exit status is 1 if any row comes out otherwise than expected.
"""

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

from shared import PACKAGES, environment, write_section

HERE = Path(__file__).resolve().parent
TITLE = "Agreement of the mathematics with TRL and Stable-Baselines3"


def table(python: Path) -> tuple[str, bool]:
    """What the comparison prints, and whether it found what it expected."""
    paths = os.pathsep.join(map(str, [HERE, HERE.parent / "src"]))
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1", **quiet}
    command = [python, "-W", "ignore", "-m", "agreement"]
    run = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
    if run.returncode:
        print(run.stderr, file=sys.stderr)  # else it holds the peers' progress bars and warnings
    return run.stdout, run.returncode == 0


def section(text: str) -> str:
    versions = ", ".join(package.replace("==", " ") for package in PACKAGES)
    return (
        f"`python benchmarks/functional_agreement.py --write`, {datetime.date.today()}; {versions}, "
        f"Python {sys.version.split()[0]}, on the CPU.\n\n{text}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "taurl" / "peers")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    options = parser.parse_args()
    text, as_expected = table(environment(options.peers))
    print(text)
    if options.write and as_expected:
        write_section(TITLE, section(text))
    raise SystemExit(0 if as_expected else 1)


if __name__ == "__main__":
    main()
