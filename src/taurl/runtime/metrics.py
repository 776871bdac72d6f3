"""Metrics and samples on disk: JSON lines, and TensorBoard beside them."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from taurl.runtime.files import write_whole, writing


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line; what is not finite becomes null, so that any JSON reader takes it.

    Arrays and their numbers are written as plain ones, what else JSON does not know (dates) as its text.

    Raises: RunError when the file cannot be written.
    """
    # A lone surrogate has no UTF-8; written as its escape it is what JSON itself calls it.
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(json_line(record) + "\n")


def print_lines(records: Iterable[Mapping[str, Any]]) -> None:
    """The same to standard output, at once."""
    for record in records:
        line = json_line(record).encode(errors="backslashreplace").decode()
        print(line, flush=True)


def json_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON, as `append_lines` writes it."""
    return json.dumps(finite(record), ensure_ascii=False, default=str)


def finite(value: Any) -> Any:
    """The value as plain numbers, lists and dictionaries, with None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):  # of numpy or torch
        return finite(value.tolist())
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line cut short by a kill is left out."""
    return [record for _, record in _whole_lines(path)]


def cut_after(path: Path, step: int) -> None:
    """Keep the records up to this step; the file is replaced at once."""
    if path.exists():
        write_whole(path, b"".join(line for line, record in _whole_lines(path) if record["step"] <= step))


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    # Bytes, because lines of text also end at separators that JSON leaves as they are inside a string.
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n"):
            yield line, record


class TensorBoard:
    """Scalars for TensorBoard, one event file a part of the run.

    Written here rather than by SummaryWriter, whose thread reports a full disk late and with a traceback.

    Args:
        purge_from: on resume, the first step that is done again: what earlier parts wrote from there on is purged.
    Raises: RunError when the file cannot be written.
    """

    def __init__(self, directory: Path, *, purge_from: int | None = None):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names.
        self.path = directory / f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}"
        with writing(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("wb")
        self.records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        if purge_from is not None:
            self._add(step=purge_from, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record's finite numbers at its step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in numbers.items() if math.isfinite(value)
        ]
        self._add(step=record["step"], summary=Summary(value=values))

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with writing(self.path):
            self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self.file.flush()

    def close(self) -> None:
        with writing(self.path):
            self.file.close()
