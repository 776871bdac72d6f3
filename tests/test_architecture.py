"""The floors of the house: imports run downwards only, and the command line's first word imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "taurl"
MAY_IMPORT = {
    "functional": {"functional"},
    "runtime": {"runtime", "functional"},
    "llm": {"llm", "runtime", "functional"},
    "control": {"control", "runtime", "functional"},
    "report": {"report", "runtime"},
    "commands": {"commands", "report", "llm", "control", "runtime"},
}


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("taurl.")}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downwards(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        assert imported_rooms(file) <= MAY_IMPORT[room], file


def test_no_source_file_is_longer_than_the_readme_says():
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(lines.values()) <= 400, max(lines, key=lines.__getitem__)


def test_functional_needs_torch_only():
    for file in (PACKAGE / "functional").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", "math"}, file
            if isinstance(node, ast.ImportFrom):
                roots = {"torch", "taurl", "typing", "collections", "dataclasses", "functools", "math"}
                assert (node.module or "").split(".")[0] in roots, file


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from taurl.cli import main; main(['--help'])", {"torch", "pydantic", "tyro", "transformers"}),
        ("import taurl.llm; taurl.llm.GRPOConfig()", {"torch", "transformers", "datasets"}),
        ("import taurl.control; taurl.control.PPOConfig()", {"torch", "gymnasium"}),
        ("import taurl.llm.rewards", {"torch", "transformers"}),
    ],
)
def test_nothing_heavy_is_imported_until_it_is_needed(statement, absent):
    code = f"{statement}; import sys; print('LOADED', *sorted(set(sys.modules) & {absent!r}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1].strip() == "LOADED"
