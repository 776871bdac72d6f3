"""The closed loop: answers are labelled, a reward model learns the labels, and picks and trains better answers.

    python examples/reward_loop.py runs/loop

1. SmolLM2-135M-Instruct answers small sums; `last_number` says which answers are right.
2. A reward model learns from these labels, and sees no answers of the held-out questions.
3. Best of N: of eight answers to a new question the one that it scores highest.
4. GRPO with the reward model as its reward, the divergence from the start held by `kl_coefficient`. `last_number`
   stands beside it with weight 0: it is watched, not learned from.
"""

import json
import sys
from pathlib import Path

from taurl.cli import main
from taurl.llm import GRPO, GRPOConfig, Reward, RewardConfig
from taurl.llm.rewards import last_number

MODEL, TASK = "smollm2-135m-instruct", "reasoning-gym:chain_sum"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(out, size, seed):
    """Eight sampled answers to each of `size` questions, labelled."""
    arguments = [f"{name}={value}" for name, value in {**SUMS, "size": size, "seed": seed}.items()]
    words = f"--model {MODEL} --prompts {TASK} --count 8 --temperature 1 --max-tokens 16 --out {out}".split()
    if main(["llm", "generate", *words, "--dataset-args", *arguments]):
        raise SystemExit(1)
    rows = read(out)
    labels = last_number([row["completion"] for row in rows], [row["answer"] for row in rows])
    return [row | {"label": label} for row, label in zip(rows, labels, strict=True)]


def loop(folder, questions=200, new=50, reward_steps=100, grpo_steps=40, held_out=100):
    folder.mkdir(parents=True)
    labelled = answer(folder / "answers.jsonl", questions, seed=0)
    config = RewardConfig(
        out=folder / "reward",
        loss="bce",
        steps=reward_steps,
        rows_per_step=16,
        learning_rate=2e-5,
        eval_rows=questions // 5,
    )
    Reward(MODEL, labelled, config).train()
    reward = f"model:{folder / 'reward' / 'final'}"

    asked = {row["prompt"] for row in labelled}
    fresh = [row for row in answer(folder / "fresh.jsonl", new, seed=1_000_000) if row["prompt"] not in asked]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fresh))
    scored = f"--model {folder / 'reward' / 'final'} --dataset {folder / 'labelled.jsonl'} --best".split()
    if main(["llm", "score", *scored, "--out", str(folder / "best.jsonl")]):
        raise SystemExit(1)
    best = read(folder / "best.jsonl")
    shares = [sum(row["label"] for row in rows) / len(rows) for rows in (fresh, best)]
    print(f"right answers: {shares[0]:.3f} of all, {shares[1]:.3f} of the best of 8 by the reward model")

    settings = GRPOConfig(
        out=folder / "grpo", steps=grpo_steps, prompts_per_step=8, group_size=8, max_tokens=16, learning_rate=1e-5,
        dataset_args=SUMS, eval_rows=held_out, kl_coefficient=0.02, reward_weights=(1.0, 0.0), tokens_per_part=1024,
    )  # fmt: skip
    trainer = GRPO(MODEL, TASK, [reward, "last_number"], settings).train()
    for record in trainer.run.records():
        if "eval/reward" in record:
            names = ("eval/rewards/reward_model/mean", "eval/rewards/last_number/mean", "kl")
            print(record["step"], {name: round(record[name], 3) for name in names if name in record})


if __name__ == "__main__":
    loop(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/loop"))
