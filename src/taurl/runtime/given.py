"""What a run was given from Python as objects, which no directory can hold: they are asked for again on resume."""

from collections.abc import Iterable

from taurl.runtime.errors import InputError
from taurl.runtime.run import GIVEN, Run


def require_given_again(run: Run, objects: Iterable[str]) -> None:
    """Refuse to resume without an object that the run was started with, or with one that it was not."""
    before, now = set(run.environment.get(GIVEN, [])), set(objects)
    for key in sorted(before - now):
        raise InputError(
            f"{run.directory}: its {key} came from Python as an object; resume from Python and give it again"
        )
    for key in sorted(now - before):
        raise InputError(
            f"{run.directory}: its {key} did not come from Python as an object, and another one would alter the past; "
            "leave it out"
        )
