"""One step on 8 pairs of GSM8K solutions: taurl's reward models and DPO against TRL's trainers.

    python benchmarks/preference.py [--only dpo] [--rounds 5] [--steps 3] [--minutes 15] [--write]

Both sides get the same token ids in the same batches, with the same weights (the reward model's head included),
learning rate and β; losses are compared step by step. With --held-out N both score N held-out pairs at the end; for the
figures of one epoch, --steps is the number of pairs over 8, less one to warm up. With --keep FOLDER what the minutes
cut short is saved, goes on when called again, and is reported when it is done, by its held-out accuracy alone. The
point-wise model, which learns to call chosen solutions good and rejected ones bad, each by itself, stands alone: TRL
has none.
"""

import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from llm_speed.data import pair_row, read
from llm_speed.heads import with_scalar_head
from llm_speed.sides import INSTALLED, OURS, SAME, Found, Job, common_job, in_turn, our_side, parser, sides
from llm_speed.tables import Target, finish, largest_difference, pass_flops, share_of_peak

from taurl.llm.data.datasets import PromptOrder
from taurl.llm.models.loading import load_tokenizer, resolve_model

PAIRS = 8
TITLES = {"dpo": "DPO step", "reward": "Reward model step", "pointwise": "Point-wise reward model step"}
RATES = {"dpo": 2e-6, "reward": 2e-5, "pointwise": 2e-5}  # of examples/dpo_gsm8k.yaml and reward_gsm8k.yaml
TARGETS = {
    "dpo": Target({INSTALLED: 5, SAME: 3.5}),
    "reward": Target({INSTALLED: 3, SAME: 2.5}),
    "pointwise": Target({}),
}


def main() -> None:
    options = parser(__doc__, steps=3)
    options.add_argument("--only", nargs="*", default=list(TITLES), choices=list(TITLES))
    options.add_argument("--held-out", type=int, default=0, help="pairs scored at the end")
    options.add_argument("--keep", type=Path, help="folder where what was trained stays, to go on from")
    options.add_argument("--sides", nargs="*", type=int, help="with --keep: 0 taurl, 1 TRL, 2 TRL, same allocator")
    options = options.parse_args()
    tokenizer = load_tokenizer(options.model)
    job = common_job(options, resolve_model(options.model))
    count = PAIRS * job["steps"]
    pairs = [pair_row(tokenizer, row) for row in read(options.data, "preferences-train.jsonl", count)]
    held_out = [pair_row(tokenizer, row) for row in read(options.data, "preferences-test.jsonl", options.held_out)]
    order = PromptOrder(len(pairs), 0).take(0, count)
    job |= {"schedule": "linear", "rows_per_step": PAIRS, "rows_per_part": PAIRS, "tokens_per_part": 2048, "beta": 0.1}
    job |= {"rows": pairs, "held_out": held_out, "order": order}
    options.minutes /= len(options.only)
    for kind in options.only:
        with TemporaryDirectory() as folder:
            begin = (options.keep or Path(folder)) / "start"
            model = job["model"] if kind == "dpo" else with_scalar_head(job["model"], tokenizer, begin.resolve())
            asked = job | {"kind": kind, "model": model, "learning_rate": RATES[kind]}
            among = [our_side()] if kind == "pointwise" else sides(options)
            if options.keep and options.sides is not None:
                among = [among[place] for place in options.sides]
            for side in among if options.keep else ():
                folder_of_side = options.keep / re.sub(r"\W+", "-", f"{kind} {side.name}")
                folder_of_side.mkdir(parents=True, exist_ok=True)
                side.own["keep"] = str(folder_of_side.resolve())
            found = in_turn(options, asked, among)
            if options.keep:
                print(*(progress(name, runs[0], asked) for name, runs in found.items()), sep="\n")
                continue
            finish(options, TITLES[kind], asked, found, TARGETS[kind], *notes(kind, asked, found))


def progress(name: str, run: Found, job: Job) -> str:
    """How far a side is, and where it is done what its model is worth."""
    done = f"{name}: {len(run['losses'])} of {job['steps']} steps"
    return done if run["accuracy"] is None else f"{done}, {interval(run['accuracy'], len(job['held_out']))} held out"


def notes(kind: str, job: Job, found: dict[str, list[Found]]) -> list[str]:
    measured = [job["rows"][index] for index in job["order"][PAIRS * job["warm_up"] :]]
    steps = len(measured) / PAIRS
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in measured) / steps
    prompts = sum(len(row["prompt_ids"]) for row in measured) / steps
    # A prompt needs to go through the model once, whatever follows it; DPO's reference sees everything, forwards only.
    passes = pass_flops(found[OURS][0], prompts + answers, answers) * (4 / 3 if kind == "dpo" else 1)
    said = [share_of_peak(job, passes, found)]
    if len(found) > 1:
        said.append(f"Losses step by step: largest difference {largest_difference(found):.0e}.")
    if job["held_out"] and all(len(run["losses"]) == job["steps"] for runs in found.values() for run in runs):
        count = len(job["held_out"])
        shares = ", ".join(f"{name} {interval(runs[0]['accuracy'], count)}" for name, runs in found.items())
        said.append(f"Accuracy on {count} held-out pairs after {job['steps']} steps, with its 95% interval: {shares}.")
    return said


def interval(share: float, count: int) -> str:
    """A share with its 95% interval (Wilson)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return f"{share:.3f} ({middle - half:.3f} to {middle + half:.3f})"


if __name__ == "__main__":
    main()
