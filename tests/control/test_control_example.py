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


def test_a_loop_over_the_records_may_be_left(tmp_path):
    code = """
from taurl.control import PPO, PPOConfig
records = PPO("CartPole-v1", PPOConfig(out="run", steps=4096, eval_episodes=0, video=False, record_every=2048)).steps()
print(next(records)["step"])
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "2048\n"
    assert "step 2,048/4,096" in found.stderr
    assert "Traceback" not in found.stderr
