"""One step of PPO on GSM8K beside a GRPO step on the same prompts: 4 prompts × 8 completions × at most 128 tokens.

    python benchmarks/ppo.py [--rounds 5] [--steps 1] [--epochs 1] [--minutes 15] [--write]

PPO with a critic of the policy's size; with a reference and a reward model of that size as well; and, LoRA against
LoRA, with all four as adapters on one frozen trunk. TRL has no PPO any more: taurl is compared with itself.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llm_speed.data import read, user
from llm_speed.heads import with_scalar_head
from llm_speed.sides import Found, Job, Side, common_job, in_turn, median_seconds, parser, peak_gb
from llm_speed.tables import bars, publish, verdict

from taurl.llm.models.loading import load_tokenizer, resolve_model

PROMPTS, GROUP, TOKENS, RANK = 4, 8, 128, 16
GRPO, LORA = "GRPO", "GRPO, LoRA"
# What PPO has beside its policy; compared with; at most so many times its seconds, and its memory.
ROWS = {
    "PPO, critic": (GRPO, 1.8, None),
    "PPO, critic, reference, reward model": (GRPO, 2.2, None),
    "PPO, LoRA, critic, reference, reward model": (LORA, None, 1.3),
}


def main() -> None:
    options = parser(__doc__, steps=1)
    options.add_argument("--epochs", type=int, default=1, help="of both")
    options = options.parse_args()
    job = common_job(options, resolve_model(options.model)) | {
        "rows_per_step": PROMPTS * GROUP,
        "tokens_per_part": 2048,
        "group_size": GROUP,
        "max_tokens": TOKENS,
        "learning_rate": 1e-6,
        "reward": "digits",
    }
    rows = read(options.data, "train.jsonl", PROMPTS * job["steps"])
    job["rows"] = [{"prompt": user(row["question"])} for row in rows]
    with TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(options.model)
        whole, adapter = (
            with_scalar_head(job["model"], tokenizer, Path(folder, str(rank)), rank) for rank in (0, RANK)
        )
        found = in_turn(options, job, variants(options.epochs, whole, adapter))
    publish(options, "PPO step", job, [table(found), verdict(missed(found))], lambda axes: bars(axes, found), panels=2)


def variants(epochs: int, whole: str, adapter: str) -> list[Side]:
    """GRPO and PPO, with the models that each row names; the reward model is a whole one, or an adapter."""
    lora = {"lora_rank": RANK, "epochs": epochs}
    alone: Job = {"critic": "copy", "kl_coefficient": 0.0, "epochs": epochs}
    jobs: dict[str, Job] = {
        GRPO: {"kind": "grpo", "settings": {"epochs": epochs}},
        "PPO, critic": {"kind": "ppo", "settings": alone},
        "PPO, critic, reference, reward model": {
            "kind": "ppo",
            "settings": alone | {"kl_coefficient": 0.05},
            "reward": f"model:{whole}",
        },
        LORA: {"kind": "grpo", "settings": lora},
        "PPO, LoRA, critic, reference, reward model": {
            "kind": "ppo",
            "settings": alone | lora | {"kl_coefficient": 0.05},
            "reward": f"model:{adapter}",
        },
    }
    return [Side(name, "ours.py", Path(sys.executable), own=own) for name, own in jobs.items()]


def table(found: dict[str, list[Found]]) -> str:
    heads = ["", "s a step", "steps", "peak GB", "times GRPO's seconds", "asked", "times GRPO's memory", "asked"]
    lines: list[list[Any]] = [heads, ["---"] * len(heads)]
    for name, runs in found.items():
        count = sum(len(run["seconds"]) for run in runs)
        cells = [name, f"{median_seconds(runs):.1f}", str(count), f"{peak_gb(runs):.1f}", *[""] * 4]
        if name in ROWS:
            base, seconds, memory = ROWS[name]
            cells[4] = f"{median_seconds(runs) / median_seconds(found[base]):.2f}"
            cells[5] = f"≤ {seconds}" if seconds else ""
            cells[6] = f"{peak_gb(runs) / peak_gb(found[base]):.2f}"
            cells[7] = f"≤ {memory}" if memory else ""
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def missed(found: dict[str, list[Found]]) -> list[str]:
    """The rows that take more than asked, each in words."""
    said = []
    for name, (base, seconds, memory) in ROWS.items():
        times = median_seconds(found[name]) / median_seconds(found[base])
        space = peak_gb(found[name]) / peak_gb(found[base])
        if seconds and times > seconds:
            said.append(f"{name}: {times:.2f} times the seconds of {base}, {seconds} asked")
        if memory and space > memory:
            said.append(f"{name}: {space:.2f} times the memory of {base}, {memory} asked")
    return said


if __name__ == "__main__":
    main()
