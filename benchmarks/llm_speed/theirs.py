"""One measurement of TRL, within the peers' environment: `python theirs.py JOB`; prints figures as JSON.

TRL at its fastest on this machine: no activation checkpointing (its default), no data-loader workers, nothing saved,
and as in taurl no attention by cuDNN.
bfloat16 is its autocast, with float32 weights, which are the masters then.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from data import Row, pair_ids, whole_ids
from datasets import Dataset
from measure import (
    Curve,
    Laps,
    held_out_nll,
    implicit_reward_of,
    pair_accuracy,
    peak_memory_gb,
    read_job,
    report,
    reward_of,
)
from rewards import REWARDS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

SAVE_EVERY = 10  # updates, where what was trained is kept


class Clock(TrainerCallback):
    def __init__(self, laps: Laps):
        self.laps = laps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.laps()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.laps()
        control.should_training_stop |= self.laps.over
        control.should_save |= self.laps.over and args.save_strategy != "no"


class Until(TrainerCallback):
    """Stops where the curve reaches its goal; stands after the clock."""

    def __init__(self, curve: Curve):
        self.curve = curve

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.curve.reached()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.curve.reached()


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Settings that all of its trainers have."""
    return {
        "output_dir": job.get("keep") or job["folder"],
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
        "save_strategy": "steps" if job.get("keep") else "no",
        "save_steps": SAVE_EVERY,
        "save_total_limit": 1,
        "disable_tqdm": True,
        "seed": job.get("seed", 0),
    }


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(job["model"])


def in_order(job: dict[str, Any], columns: Callable[[Row], Row] = dict) -> Dataset:
    """The rows in the order in which taurl takes them."""
    return Dataset.from_list([columns(job["rows"][index]) for index in job["order"]])


def train(trainer: Any, job: dict[str, Any]) -> None:
    """All updates, or those that an earlier run has left; until the minutes are over."""
    trainer.train(resume_from_checkpoint=get_last_checkpoint(job["keep"]) if job.get("keep") else None)


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
    if "goal" in job:
        curve = Curve(job, laps, lambda: accuracy(model, tokenizer, job))
        trainer.add_callback(Until(curve))
    trainer.train()
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "reward" in entry]
    report(job, laps, mean_length=statistics.mean(lengths[laps.first :]), curve=curve.points if "goal" in job else None)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, job: dict[str, Any], size: int = 50) -> float:
    """Mean reward of greedy answers to the held-out questions."""
    model.eval()
    rewards: list[float] = []
    for start in range(0, len(job["held_out"]), size):
        rows = job["held_out"][start : start + size]
        inputs = tokenizer.apply_chat_template(
            [row["prompt"] for row in rows],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        ).to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=job["max_tokens"])
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards += REWARDS[job["reward"]](completions=texts, answer=[row["answer"] for row in rows])
    model.train()
    return statistics.mean(rewards)


def dpo(job: dict[str, Any], laps: Laps) -> None:
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """Takes rows that are token ids already, as its other trainers do by themselves."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    model, tokenizer = load(job)
    config = DPOConfig(**arguments(job), max_length=None, beta=job["beta"])
    given = {"train_dataset": in_order(job, pair_ids), "processing_class": tokenizer, "callbacks": [Clock(laps)]}
    trainer = Tokenized(model, args=config, **given)
    train(trainer, job)
    peak = peak_memory_gb(job["device"])
    accuracy = pair_accuracy(implicit_reward_of(trainer.model, load(job)[0]), job, len(losses(trainer)))
    report(job, laps, peak_gb=peak, losses=losses(trainer), accuracy=accuracy)


def reward(job: dict[str, Any], laps: Laps) -> None:
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32)
    config = RewardConfig(**arguments(job), max_length=None)
    given = {"train_dataset": in_order(job, whole_ids), "callbacks": [Clock(laps)]}
    trainer = RewardTrainer(model, config, processing_class=AutoTokenizer.from_pretrained(job["model"]), **given)
    train(trainer, job)
    peak = peak_memory_gb(job["device"])
    accuracy = pair_accuracy(reward_of(trainer.model), job, len(losses(trainer)))
    report(job, laps, peak_gb=peak, losses=losses(trainer), accuracy=accuracy)


if __name__ == "__main__":
    job = read_job()
    torch.backends.cuda.enable_cudnn_sdp(False)  # on a GPU it makes a plan for every new shape, and most are new
    {"sft": sft, "grpo": grpo, "dpo": dpo, "reward": reward}[job["kind"]](job, Laps(job))
