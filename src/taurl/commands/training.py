"""What the training commands of both wings do alike."""

import contextlib
from pathlib import Path
from typing import Any, TypeVar

from taurl.runtime.config import RunConfig, read_config
from taurl.runtime.errors import one_line

Config = TypeVar("Config", bound=RunConfig)


def stored(directory: Path, algorithm: str, config_class: type[Config]) -> Config:
    """The settings that a run was given. Raises: InputError when it is another algorithm's."""
    from taurl.runtime.directory import require_algorithm

    require_algorithm(directory, algorithm)
    return read_config(directory, config_class)


def train_and_report(trainer: Any) -> None:
    """Train, and leave a report of the run however it ends."""
    from taurl.report import write_report

    try:
        trainer.train()
    except BaseException:
        with contextlib.suppress(Exception):  # the first failure is the one to tell
            write_report(trainer.run.directory)
        raise
    try:
        write_report(trainer.run.directory)
    except Exception as error:  # the training stands
        trainer.run.view.note(f"the report could not be written: {one_line(error)}; taurl report makes it again")
