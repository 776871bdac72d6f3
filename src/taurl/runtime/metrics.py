"""Metrics and samples on disk: JSON lines, and TensorBoard beside them."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line; what is not finite becomes null, so that any JSON reader takes it."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(finite(record), ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """The value with every float that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def cut_after(path: Path, step: int) -> None:
    """Keep the records up to this step; the file is replaced at once."""
    if path.exists():
        partial = path.with_name(f".{path.name}.partial")
        partial.unlink(missing_ok=True)
        partial.touch()
        append_lines(partial, (record for record in read_lines(path) if record["step"] <= step))
        os.replace(partial, path)


class TensorBoard:
    """Scalars for TensorBoard; what a killed run wrote past its checkpoint is purged on resume."""

    def __init__(self, directory: Path, *, purge_after: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        purge = None if purge_after is None else purge_after + 1
        self.writer = SummaryWriter(str(directory), purge_step=purge)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
