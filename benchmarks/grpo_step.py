"""One GRPO step on GSM8K, 4 prompts × 8 completions × at most 128 tokens, one update: taurl against TRL's GRPOTrainer.

    python benchmarks/grpo_step.py [--rounds 5] [--steps 1] [--minutes 10] [--write]

Both sides sample from the same prompts in the same order, with the same weights, learning rate and reward: the share of
digits, which differs within every group, so that none is left out of the update. What is sampled differs, and with it
the lengths, which are printed. TRL accumulates its gradient over parts of 8 rows, taurl over parts of 2,048 tokens.
"""

import statistics

from llm_speed.data import read, user
from llm_speed.sides import INSTALLED, OURS, SAME, common_job, in_turn, parser
from llm_speed.tables import Target, finish, pass_flops, share_of_peak

from taurl.llm.data.chat import encode_prompt
from taurl.llm.data.datasets import PromptOrder
from taurl.llm.models.loading import load_tokenizer, resolve_model

PROMPTS, GROUP, TOKENS = 4, 8, 128
TARGET = Target({INSTALLED: 5, SAME: 3.5})


def main() -> None:
    options = parser(__doc__, steps=3).parse_args()
    job = common_job(options, resolve_model(options.model)) | {
        "kind": "grpo",
        "rows_per_step": PROMPTS * GROUP,
        "rows_per_part": 8,
        "tokens_per_part": 2048,
        "group_size": GROUP,
        "max_tokens": TOKENS,
        "learning_rate": 1e-6,
        "reward": "digits",
    }
    rows = [{"prompt": user(row["question"])} for row in read(options.data, "train.jsonl", PROMPTS * job["steps"])]
    job |= {"rows": rows, "order": PromptOrder(len(rows), 0).take(0, len(rows))}
    found = in_turn(options, job)
    ours, tokenizer = found[OURS], load_tokenizer(options.model)
    prompt = statistics.mean(len(encode_prompt(row["prompt"], tokenizer)) for row in rows)
    completions = PROMPTS * GROUP * statistics.mean(run["mean_length"] for run in ours)
    sampling, updating = (statistics.mean(run[phase] for run in ours) for phase in ("sampling", "updating"))
    lengths = [f"{name} {statistics.mean(run['mean_length'] for run in runs):.0f}" for name, runs in found.items()]
    finish(
        options,
        "GRPO step",
        job,
        found,
        TARGET,
        f"Tokens a completion: {', '.join(lengths)}.",
        f"Of taurl's step {sampling:.1f} s are sampling and {updating:.1f} s the update.",
        share_of_peak(job, pass_flops(ours[0], PROMPTS * prompt + completions, completions), found),
    )


if __name__ == "__main__":
    main()
