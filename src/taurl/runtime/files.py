"""Writing files: a failure is said in one line, and no reader meets half a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taurl.runtime.errors import InputError, RunError, reason


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write (disk full, no permission) into a RunError that names the path."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: could not be written ({reason(error)})") from error


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once. Raises: RunError when it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        partial.write_bytes(content)
        os.replace(partial, path)


def require_new(path: Path | None) -> None:
    """Before any work starts: InputError if a file for results exists, or cannot be made; its folder is made."""
    if path is None:
        return
    if path.exists():
        raise InputError(f"{path} exists already; give another file or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot write there: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot write there: no permission")


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
