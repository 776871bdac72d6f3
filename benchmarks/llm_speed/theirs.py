"""One measurement of TRL, within the peers' environment: `python theirs.py JOB`; prints figures as JSON.

TRL at its fastest on this machine: no activation checkpointing (its default), no data-loader workers, nothing saved.
bfloat16 is its autocast, with float32 weights, which are the masters then.
"""

import statistics
from typing import Any

import torch
from datasets import Dataset
from measure import Laps, held_out_nll, peak_memory_gb, read_job, report
from rewards import REWARDS
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    def __init__(self, laps: Laps):
        self.laps = laps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.laps()
        control.should_training_stop |= self.laps.over


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Settings that all of its trainers have."""
    return {
        "output_dir": job["folder"],
        "use_cpu": job["device"] == "cpu",
        "bf16": job["precision"] == "bfloat16",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": job["rows_per_part"],
        "gradient_accumulation_steps": job["rows_per_step"] // job["rows_per_part"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": job.get("schedule", "constant"),
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": job.get("seed", 0),
    }


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(job["model"])


def in_order(job: dict[str, Any]) -> Dataset:
    """The rows in the order in which taurl takes them."""
    return Dataset.from_list([job["rows"][index] for index in job["order"]])


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(job: dict[str, Any], laps: Laps) -> None:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(job)
    config = SFTConfig(**arguments(job), max_length=None, shuffle_dataset=False)
    given = {"train_dataset": in_order(job), "processing_class": tokenizer, "callbacks": [Clock(laps)]}
    trainer = SFTTrainer(model, config, **given)
    trainer.train()
    peak = peak_memory_gb(job["device"])
    nll = held_out_nll(trainer.model, job["held_out"])
    report(job, laps, peak_gb=peak, losses=losses(trainer), held_out_nll=nll)


def grpo(job: dict[str, Any], laps: Laps) -> None:
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(job)
    config = GRPOConfig(
        **arguments(job),
        num_generations=job["group_size"],
        max_completion_length=job["max_tokens"],
        generation_batch_size=job["rows_per_step"],
        shuffle_dataset=False,
        temperature=1.0,
        loss_type="dapo",
        beta=0.0,
    )
    trainer = GRPOTrainer(
        model,
        REWARDS[job["reward"]],
        config,
        train_dataset=in_order(job),
        processing_class=tokenizer,
        callbacks=[Clock(laps)],
    )
    trainer.train()
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "reward" in entry]
    report(job, laps, mean_length=statistics.mean(lengths[laps.warm_up :]))


if __name__ == "__main__":
    job = read_job()
    {"sft": sft, "grpo": grpo}[job["kind"]](job, Laps(job))
