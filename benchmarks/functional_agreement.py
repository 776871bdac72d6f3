"""The mathematics against TRL, Stable-Baselines3 and sb3-contrib: the same numbers through both, one table.

    python benchmarks/functional_agreement.py [--peers FOLDER] [--write]

The first call makes a virtual environment for the peers (a minute or more, 1.5 GB; pip's own configuration says from
where), later ones use it. It is no part of taurl's. `--write` puts the table into RESULTS.md, in place of the last one.
The exit status is 1 if any row comes out otherwise than expected.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = [
    "torch==2.13.0",
    "trl==1.16.0",
    "stable-baselines3==2.9.2",
    "sb3-contrib==2.9.2",
    "sbx-rl==0.28.0",
    "mujoco",
    "imageio",
]
TITLE = "Agreement of the mathematics with TRL and Stable-Baselines3"


def environment(folder: Path) -> Path:
    """The Python of an environment that holds the peers, made if need be; half an installation is taken up again."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = folder / "peers-installed.txt"
    if not complete.exists() or complete.read_text().split() != PACKAGES:
        venv.create(folder, with_pip=True)
        constraints = HERE.parent / "constraints.txt"
        subprocess.run([python, "-m", "pip", "install", "-qq", *PACKAGES, "-c", constraints], check=True)
        complete.write_text("\n".join(PACKAGES))
    return python


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
        f"## {TITLE}\n\n`python benchmarks/functional_agreement.py --write`, {datetime.date.today()}; {versions}, "
        f"Python {sys.version.split()[0]}, on the CPU.\n\n{text.strip()}\n"
    )


def write(path: Path, text: str) -> None:
    """Replace the section of that title, or append it."""
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results of the benchmarks\n"
    old = re.search(rf"^## {re.escape(TITLE)}\n.*?(?=^## |\Z)", before, re.DOTALL | re.MULTILINE)
    if old:
        after = before[old.end() :]
        text = before[: old.start()] + text + ("\n" + after if after else "")
    else:
        text = before.rstrip() + "\n\n" + text
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "taurl" / "peers")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    options = parser.parse_args()
    text, as_expected = table(environment(options.peers))
    print(text)
    if options.write and as_expected:
        write(HERE / "RESULTS.md", section(text))
    raise SystemExit(0 if as_expected else 1)


if __name__ == "__main__":
    main()
