"""Runs a benchmark that prints its table, and puts what it prints into RESULTS.md under a title.

python benchmarks/record.py TITLE SCRIPT.py [ITS OPTIONS …]
"""

import datetime
import subprocess
import sys

import torch
from shared import HERE, PACKAGES, write_section

from taurl.runtime.machine import describe_machine


def main() -> None:
    title, script, *options = sys.argv[1:]
    done = subprocess.run([sys.executable, HERE / script, *options], stdout=subprocess.PIPE, encoding="utf-8")
    print(done.stdout)
    if done.returncode:
        raise SystemExit(done.returncode)
    command = " ".join(["python", f"benchmarks/{script}", *options])
    if torch.cuda.is_available():
        torch.cuda.init()  # so that the GPU is named, too
    machine = ", ".join(value for name, value in describe_machine().items() if name != "platform")
    peers = ", ".join(package.replace("==", " ") for package in PACKAGES)
    about = f"`{command}`, {datetime.date.today()}; Python, processor: {machine}; versions of the peers: {peers}."
    write_section(title, f"{about}\n\n{done.stdout}")


if __name__ == "__main__":
    main()
