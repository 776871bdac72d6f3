"""What the benchmarks share: the peers' environment, and the sections of RESULTS.md."""

import os
import re
import subprocess
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
PACKAGES = [
    "torch==2.13.0",
    "trl==1.16.0",
    "stable-baselines3==2.9.2",
    "sb3-contrib==2.9.2",
    "sbx-rl==0.28.0",
    "mujoco",
    "imageio",
]


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


def write_section(title: str, text: str, path: Path = RESULTS) -> None:
    """Put `text` under this heading, in place of what stands there, or at the end."""
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results of the benchmarks\n"
    text = f"## {title}\n\n{text.strip()}\n"
    old = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", before, re.DOTALL | re.MULTILINE)
    if old:
        after = before[old.end() :]
        text = before[: old.start()] + text + ("\n" + after if after else "")
    else:
        text = before.rstrip() + "\n\n" + text
    path.write_text(text, encoding="utf-8")
