"""What commands that answer or score share: a progress bar, and a look at the file that results go to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from taurl.runtime.errors import InputError

if TYPE_CHECKING:
    from taurl.llm.generation import Completion
    from taurl.llm.inference import Model


def answers(model: Model, prompts: Sequence[Sequence[int]], count: int = 1) -> Iterator[list[list[Completion]]]:
    """`Model.complete` under a progress bar."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answering", total=len(prompts) * count)
        yield from model.complete(prompts, count, lambda done: progress.update(task, completed=done))


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
