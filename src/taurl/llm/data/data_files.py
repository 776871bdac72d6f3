"""Rows from JSONL, JSON, CSV and Parquet files. A row that cannot be read is named by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from taurl.runtime.errors import InputError, one_line, shorten

Row = dict[str, Any]
LONGEST_CELL = 2**31 - 1  # characters of a CSV cell: a text may be long


def read_file(name: str) -> list[Row]:
    """All rows of a data file, as `iterate_file` gives them. Raises: InputError, also for a file without rows."""
    rows = list(iterate_file(name))
    if not rows:
        raise InputError(f"{name}: holds no rows")
    return rows


def iterate_file(name: str) -> Iterator[Row]:
    """The rows of a data file, one dict a row, read as they are taken (but for a .json that is one array).

    The file's ending chooses how it is read (see `READERS`). CSV values stay strings, but for messages as JSON.

    Raises: InputError for a missing file, an unknown ending, or the first row that cannot be read, with its line.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"data set '{name}' is a folder; give one file in it ({', '.join(READERS)})")
    if not path.is_file():
        raise InputError(f"no such data file: '{name}'")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"data file '{name}' ends in '{path.suffix}'; expected one of {', '.join(READERS)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {one_line(error)}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        yield from _parse_lines(path, file)


def _parse_lines(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({one_line(error)}): {shorten(line, 60)}") from error
        yield _require_object(row, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        # JSON lines under the shorter name; `splitlines` would cut at U+2028 too
        yield from _parse_lines(path, text.split("\n"))
        return
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {one_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield _require_object(row, f"{path}: item {number}")


def _require_object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: found {shorten(json.dumps(row, ensure_ascii=False), 60)}; expected an object {{column: value}}"
        )
    return row


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(LONGEST_CELL)
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        try:
            for values in reader:
                if not values:
                    continue
                if header is None:
                    header = _header(values, path)
                elif len(values) != len(header):
                    raise InputError(
                        f"{path}:{reader.line_num}: {len(values)} values for the {len(header)} columns "
                        f"{', '.join(header)}; "
                        "quote a value that holds commas or line breaks"
                    )
                else:
                    yield {name: _messages_or_text(value) for name, value in zip(header, values, strict=True)}
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: not CSV: {one_line(error)}") from error


def _messages_or_text(value: str) -> Any:
    """The messages of a cell that holds them as JSON; any other text as it is."""
    if not value.lstrip().startswith("[{"):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in found) else value


def _header(names: list[str], path: Path) -> list[str]:
    unusable = sorted({name for name in names if not name.strip() or names.count(name) > 1})
    if unusable:
        raise InputError(f"{path}:1: the header names a column twice or not at all: {unusable[0]!r}")
    return names


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from map(without_filled_keys, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file: {one_line(error)}") from error


def without_filled_keys(row: Row) -> Row:
    """A row without the None that Arrow fills in, where it gives every dict of a column the keys of all of them.

    What JSON lines say is null stays: a call of a tool may mean it.
    """
    return {name: _without_none(value) for name, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
