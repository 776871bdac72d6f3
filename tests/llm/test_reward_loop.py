"""The example that closes the loop runs from labelled answers to GRPO, here on a tiny model."""

import importlib.util
from pathlib import Path

from tiny_policy import save_tiny_policy

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward_loop.py"


def test_the_loop_closes(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("reward_loop", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "MODEL", str(save_tiny_policy(tmp_path / "tiny")))
    example.loop(tmp_path / "loop", questions=20, new=5, reward_steps=2, grpo_steps=1, held_out=5)
    printed = capsys.readouterr().out
    assert "of the best of 8 by the reward model" in printed
    assert "'eval/rewards/reward_model/mean'" in printed
    best = example.read(tmp_path / "loop" / "best.jsonl")
    fresh = example.read(tmp_path / "loop" / "labelled.jsonl")
    assert {row["prompt"] for row in best} == {row["prompt"] for row in fresh}
    assert len(best) == len({row["prompt"] for row in best})
