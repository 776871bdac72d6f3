"""`taurl report RUN`: the report again, from the run directory alone."""

from collections.abc import Sequence
from pathlib import Path

from taurl.runtime.errors import InputError

USAGE = "usage: taurl report RUN\n\nWrites report.html of the run directory RUN, from the files there alone."


def main(words: Sequence[str]) -> int:
    if set(words) & {"-h", "--help"}:
        print(USAGE)
        return 0
    if len(words) != 1 or words[0].startswith("-"):
        raise InputError(f"expected one run directory, found {' '.join(words) or 'nothing'}; usage: taurl report RUN")
    from taurl.report import write_report

    print(write_report(Path(words[0])))
    return 0
