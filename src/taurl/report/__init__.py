"""One self-contained HTML page about a run, made from the files in its run directory alone.

Floor 4 of the house, and the lightest: it reads what `runtime.Run` wrote and imports no wing and no torch.
"""

from pathlib import Path

__all__ = ["write_report"]


def write_report(run_directory: Path) -> Path:
    """Write `report.html` in the run directory and return its path.

    May be called while the run goes on, and for a run that was cut off: the page says what is missing or unreadable.

    Raises:
        InputError: the directory is missing, or holds none of the files of a run.
        RunError: the page cannot be written (disk full, no permission).
    """
    from taurl.report.page import write_page  # plotly and jinja2 only where a page is made

    return write_page(Path(run_directory))
