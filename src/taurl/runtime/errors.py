"""The errors that a person reads: one clear line each, and the exit code that goes with it."""


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


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the system's words, the message's first line, or the kind of error."""
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(str(text).splitlines()), type(error).__name__)
