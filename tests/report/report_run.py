"""A run directory as a killed or finished run leaves it, written by hand: the report must need nothing else."""

import json
from collections.abc import Iterable
from typing import Any

CONFIG = "model: smollm2-135m-instruct\ndataset: reasoning-gym:chain_sum\nsteps: 4\nnested: {low: 0.2, names: [a, b]}\n"
ENVIRONMENT = {"taurl": "0.1.0", "device": "cpu", "cpu": "Some CPU", "threads": 2}


def training_record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "seconds": 31.0 * step,
        "reward": 0.1 * step,
        "reward_std": 0.05,
        "rewards/last_number/mean": 0.1 * step,
        "rewards/last_number/seconds": 0.01,
        "entropy": 1.0 / step,
        "kl": None,
        "clip_ratio/low_mean": 0.0,
        "completions/mean_length": 40.0 - step,
        "completions/clipped_ratio": 0.1,
        "learning_rate": 1e-5,
        "tokens_per_second": 900.0 + step,
        "time/sample": 2.0,
        "time/update": 3.0,
        "memory/peak_gb": 4.0 + 0.05 * step,
    }


def evaluation_record(step: int, score: float) -> dict[str, Any]:
    return {"step": step, "eval/rewards/last_number/mean": score, "eval/reward": score}


def sample(step: int, kind: str, row: int, completion: str, reward: float = 0.0) -> dict[str, Any]:
    return {
        "step": step,
        "kind": kind,
        "row": row,
        "prompt": f"prompt {row}",
        "completion": completion,
        "reward": reward,
        "rewards": {"last_number": reward},
        "finish": "stop",
        "tokens": 7,
    }


def json_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
