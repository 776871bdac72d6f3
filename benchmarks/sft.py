"""One step of supervised fine-tuning on GSM8K, 8 rows, completions only: taurl against TRL's SFTTrainer.

    python benchmarks/sft.py [--rounds 5] [--steps 3] [--minutes 10] [--write]

Both sides get the same token ids in the same batches, with the same weights and learning rate. The losses are compared
step by step and, if both took as many steps, the mean negative log-likelihood of held-out completions after them.
"""

from llm_speed.data import completion_row, read
from llm_speed.sides import INSTALLED, OURS, SAME, Found, Job, common_job, in_turn, median_seconds, parser
from llm_speed.tables import Target, finish, largest_difference, pass_flops, share_of_peak

from taurl.llm.data.datasets import PromptOrder
from taurl.llm.models.loading import load_tokenizer, resolve_model

ROWS, HELD_OUT = 8, 32
TARGET = Target({INSTALLED: 5, SAME: 3.5})
SHARE = 0.35  # of the matrix-product peak, asked


def main() -> None:
    options = parser(__doc__, steps=5).parse_args()
    job = common_job(options, resolve_model(options.model)) | {
        "kind": "sft",
        "rows_per_step": ROWS,
        "rows_per_part": ROWS,
        "tokens_per_part": 2048,
        "learning_rate": 1e-5,
    }
    tokenizer = load_tokenizer(options.model)
    train, test = (
        [completion_row(tokenizer, row["question"], row["answer"]) for row in read(options.data, name, count)]
        for name, count in (("train.jsonl", ROWS * job["steps"]), ("test.jsonl", HELD_OUT))
    )
    order = PromptOrder(len(train), 0).take(0, len(train))
    job |= {"rows": train, "held_out": test, "order": order}
    found = in_turn(options, job)
    measured = [train[index] for index in order[ROWS * job["warm_up"] :]]
    steps = len(measured) / ROWS
    tokens = sum(len(row["input_ids"]) for row in measured) / steps
    targets = sum(label != -100 for row in measured for label in row["labels"]) / steps
    notes = [
        f"{tokens:.0f} tokens a step, {targets:.0f} of them targets. Tokens a second: "
        + ", ".join(f"{name} {tokens / median_seconds(runs):.0f}" for name, runs in found.items())
        + ".",
        share_of_peak(job, pass_flops(found[OURS][0], tokens, targets), found) + f" Asked: {SHARE:.0%}.",
        likelihoods(found, job),
    ]
    finish(options, "SFT step", job, found, TARGET, *notes)


def likelihoods(found: dict[str, list[Found]], job: Job) -> str:
    """Held-out NLL of each side, and how far the losses before it lie apart."""
    said = [f"Losses step by step: largest difference {largest_difference(found):.0e}." if len(found) > 1 else ""]
    if all(len(run["losses"]) == job["steps"] for runs in found.values() for run in runs):
        nll = ", ".join(f"{name} {runs[0]['held_out_nll']:.4f}" for name, runs in found.items())
        said.append(f"Held-out NLL a token after {job['steps']} steps, {HELD_OUT} completions: {nll}.")
    return " ".join(filter(None, said))


if __name__ == "__main__":
    main()
