"""One measurement of taurl: `python ours.py JOB`; prints figures as JSON, as theirs.py does."""

import statistics
from pathlib import Path
from typing import Any

import torch
from data import words
from measure import (
    Curve,
    Laps,
    held_out_nll,
    implicit_reward_of,
    pair_accuracy,
    parameters,
    peak_memory_gb,
    read_job,
    report,
    reward_of,
)
from rewards import REWARDS

from taurl import llm
from taurl.llm.data.chat import encode_prompt, stop_token_ids
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.runtime.machine import choose_device, keep_freed_memory

OPERATORS = 8  # of the profile that are named


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Settings that all of its trainers have; its weights are in the job's precision, its masters in float32."""
    return {
        "model": job["model"],
        "out": Path(job.get("keep") or job["folder"]) / "run",
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
        "compile_layers": job.get("compile_layers", False),
    }


def grpo(job: dict[str, Any], laps: Laps) -> None:
    online(job, laps, llm.GRPO, llm.GRPOConfig)


def ppo(job: dict[str, Any], laps: Laps) -> None:
    online(job, laps, llm.PPO, llm.PPOConfig)


def online(job: dict[str, Any], laps: Laps, trainer_class: Any, config_class: Any) -> None:
    config = config_class(
        **settings(job),
        prompts_per_step=job["rows_per_step"] // job["group_size"],
        group_size=job["group_size"],
        max_tokens=job["max_tokens"],
        slots=job["rows_per_step"],
        **job.get("settings", {}),
    )
    trainer = trainer_class(None, job["rows"], REWARDS.get(job["reward"], job["reward"]), config)
    curve = Curve(job, laps, lambda: accuracy(trainer, job)) if "goal" in job else None
    records = run(job, trainer, laps, curve)
    measured = records[laps.first :]
    report(
        job,
        laps,
        mean_length=mean(measured, "completions/mean_length"),
        sampling=mean(measured, "time/sample"),
        updating=mean(measured, "time/update"),
        curve=curve and curve.points,
        **parameters(trainer.policy.model),
    )


def sample(job: dict[str, Any], laps: Laps) -> None:
    device = choose_device(job["device"])
    model = load_model(job["model"], dtype=getattr(torch, job["precision"]), device=device)
    stops = stop_token_ids(model, load_tokenizer(job["model"]))
    sampler = SlotSampler(model, stop_token_ids=stops, slots=len(job["prompts"]) * job["group_size"])
    tokens: list[int] = []
    laps()
    while len(tokens) < job["steps"] and not (tokens and laps.over):
        groups = sampler.generate(job["prompts"], job["group_size"], Sampling(job["max_tokens"]), key=(0, len(tokens)))
        laps()
        tokens.append(sum(len(completion.tokens) for group in groups for completion in group))
    report(job, laps, tokens=tokens[laps.first :])


def accuracy(trainer: Any, job: dict[str, Any]) -> float:
    """Mean reward of greedy answers to the held-out questions."""
    tokenizer, greedy = trainer.policy.tokenizer, Sampling(job["max_tokens"], temperature=0)
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in job["held_out"]]
    groups = trainer.generator.generate(prompts, 1, greedy)
    texts = [tokenizer.decode(group[0].tokens, skip_special_tokens=True) for group in groups]
    return statistics.mean(REWARDS[job["reward"]](completions=texts, answer=[row["answer"] for row in job["held_out"]]))


def sft(job: dict[str, Any], laps: Laps) -> None:
    trainer = llm.SFT(None, job["rows"], config=llm.SFTConfig(**settings(job), rows_per_step=job["rows_per_step"]))
    records = run(job, trainer, laps)
    model, peak = trainer.policy.model, peak_memory_gb(job["device"])
    nll = held_out_nll(model, job["held_out"])
    report(job, laps, peak_gb=peak, losses=losses(records), held_out_nll=nll, **parameters(model))


def dpo(job: dict[str, Any], laps: Laps) -> None:
    config = llm.DPOConfig(
        **settings(job), prompts_per_step=job["rows_per_step"], beta=job["beta"], cache_reference=False
    )
    trainer = made(llm.DPO, config, [words(row) for row in job["rows"]])
    records = run(job, trainer, laps)
    model, peak = trainer.policy.model, peak_memory_gb(job["device"])
    reference = load_model(job["model"], dtype=model.dtype, device=job["device"])
    score = pair_accuracy(implicit_reward_of(model, reference), job, len(records))
    report(job, laps, peak_gb=peak, losses=losses(records), accuracy=score, **parameters(model))


def reward(job: dict[str, Any], laps: Laps) -> None:
    reward_model(job, laps, "bradley_terry")


def pointwise(job: dict[str, Any], laps: Laps) -> None:
    reward_model(job, laps, "bce")


def reward_model(job: dict[str, Any], laps: Laps, loss: str) -> None:
    config = llm.RewardConfig(**settings(job), rows_per_step=job["rows_per_step"], loss=loss)
    trainer = made(llm.Reward, config, [words(row) for row in job["rows"]])
    records = run(job, trainer, laps)
    model, peak = trainer.policy.model, peak_memory_gb(job["device"])
    score = pair_accuracy(reward_of(model), job, len(records))
    report(job, laps, peak_gb=peak, losses=losses(records), accuracy=score, **parameters(model))


def made(trainer_class: Any, config: Any, rows: list[dict[str, Any]]) -> Any:
    """A new run, or the one that an earlier call has left in its directory."""
    if (config.out / "config.yaml").exists():
        return trainer_class.resume(config.out, dataset=rows)
    return trainer_class(None, rows, config=config)


def run(job: dict[str, Any], trainer: Any, laps: Laps, curve: Curve | None = None) -> list[dict[str, Any]]:
    """The records of all updates, until the minutes are over or the goal of the curve is reached."""
    laps()
    if curve:
        curve.reached()
    records = []
    profile = torch.profiler.profile() if job.get("profile") else None
    for record in trainer.steps():
        laps()
        records.append(record)
        if (curve and curve.reached()) or laps.over:
            break
        if profile and len(records) == job["warm_up"]:  # which holds what is compiled and loaded once
            profile.start()
    if job.get("keep"):
        trainer.run.save()
        records = trainer.run.records()
    if profile:
        profile.stop()
        job["operators"] = shares(profile)
    return records


def shares(profile: torch.profiler.profile) -> list[tuple[str, float]]:
    """The operators that took most time themselves, and their share of all of it."""
    events = sorted(profile.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    whole = sum(event.self_cpu_time_total for event in events)
    return [(event.key, event.self_cpu_time_total / whole) for event in events[:OPERATORS]]


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


def mean(records: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(record[name] for record in records)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    job = read_job()
    kinds = {one.__name__: one for one in (sft, grpo, dpo, reward, pointwise, ppo, sample)}
    kinds[job["kind"]](job, Laps(job))
