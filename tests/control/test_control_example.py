"""The shipped example runs, and what it trains balances the pole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "control_python.py"


@pytest.mark.slow
def test_the_example_trains_saves_loads_and_acts(tmp_path):
    found = subprocess.run([sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=True)
    scored, balanced = found.stdout.splitlines()
    score, steps = re.fullmatch(r"return ([\d.]+) ± [\d.]+", scored), re.search(r"pole for (\d+) steps", balanced)
    assert score is not None
    assert float(score[1]) > 400
    assert steps is not None
    assert int(steps[1]) > 400
    assert len(list((tmp_path / "runs").glob("ppo-*/artifacts/trained-policy.gif"))) == 1
