"""The errors that a person reads: one clear line each, and the exit code that goes with it."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_REASON = 240  # characters of somebody else's error message that still read as one line


class InputError(ValueError):
    """Something given was wrong (option, file, data, reward function). Exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """A run could not go on (disk full, out of memory, losses that are not finite). Exit code 1."""

    exit_code = 1


class Interrupted(RuntimeError):
    """A signal asked the run to stop; the step was finished and checkpointed. Exit code 128 + signal number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of the input begin with where it came from."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the system's words, the message's first line, or the kind of error."""
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(str(text).splitlines()), type(error).__name__)


def one_line(error: BaseException | str) -> str:
    """The whole message of an error as one line of bounded length, for use inside a line of our own."""
    text = str(error)
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return shorten(text, LONGEST_REASON)


def shorten(text: str, limit: int) -> str:
    """White space collapsed to single blanks, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
