"""One measurement of taurl: `python ours.py JOB`; prints figures as JSON, as theirs.py does."""

import statistics
from pathlib import Path
from typing import Any

from measure import Laps, parameters, read_job, report
from rewards import REWARDS

from taurl import llm
from taurl.runtime.machine import keep_freed_memory


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Settings that all of its trainers have; its weights are in the job's precision, its masters in float32."""
    return {
        "model": job["model"],
        "out": Path(job["folder"]) / "run",
        "device": job["device"],
        "precision": job["precision"],
        "threads": job["threads"],
        "steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "schedule": job.get("schedule", "constant"),
        "seed": job.get("seed", 0),
        "eval_rows": 0,
        "save_every": 0,
        "tokens_per_part": job["tokens_per_part"],
    }


def grpo(job: dict[str, Any], laps: Laps) -> None:
    config = llm.GRPOConfig(
        **settings(job),
        prompts_per_step=job["rows_per_step"] // job["group_size"],
        group_size=job["group_size"],
        max_tokens=job["max_tokens"],
        slots=job["rows_per_step"],
    )
    trainer = llm.GRPO(None, job["rows"], REWARDS[job["reward"]], config)
    records = run(trainer, laps)
    report(
        job,
        laps,
        mean_length=mean(records, "completions/mean_length"),
        sampling=mean(records, "time/sample"),
        updating=mean(records, "time/update"),
        **parameters(trainer.policy.model),
    )


def run(trainer: Any, laps: Laps) -> list[dict[str, Any]]:
    """The records of the measured updates."""
    records = []
    for record in trainer.steps():
        laps()
        records.append(record)
        if laps.over:
            break
    return records[laps.warm_up :]


def mean(records: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(record[name] for record in records)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    job = read_job()
    {"grpo": grpo}[job["kind"]](job, Laps(job))
