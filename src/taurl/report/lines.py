"""Reading JSON lines that a run may still be writing, or was killed while writing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path, notices: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (byte offset, length in bytes, record) for each line that is an object with a whole number as `step`.

    A missing file yields nothing. Other lines are left out; how many and where goes to `notices` at the end.
    """
    if not path.is_file():
        return
    bad: list[int] = []
    offset, number = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = parse_line(line)
            if record is not None:
                yield offset, len(line), record
            elif line.strip():
                bad.append(number)
            offset += len(line)
    if bad == [number]:
        notices.append(f"{path.name}: its last line, {number}, is cut or no JSON object with a step; it is left out.")
    elif bad:
        where = ", ".join(map(str, bad[:5])) + (" and more" if len(bad) > 5 else "")
        notices.append(
            f"{path.name}: {len(bad)} of {number} lines left out, no JSON objects with a step: line {where}."
        )


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in one line, or None if it is not a JSON object with a whole, non-negative `step`."""
    try:
        record = json.loads(line.decode("utf-8", errors="replace"))
        step = record["step"]
        whole = not isinstance(step, bool) and int(step) == step and step >= 0
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return record if whole else None
