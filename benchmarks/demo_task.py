"""The task of `make demo` until 0.60 of the held-out answers are right: taurl against TRL's GRPOTrainer.

    python benchmarks/demo_task.py [--goal 0.6] [--minutes 120] [--every 10] [--write]

Both sides take batch, lengths and rate of examples/grpo_arithmetic.yaml, the same questions in the same order and the
same reward, and divide by the group's deviation: TRL cannot divide by the group's mean, as the example does.
Every so many updates the clock stands still, and both answer 200 held-out questions greedily. A side that does not get
there within its share of the minutes says how far it came.
"""

from typing import Any

import yaml
from llm_speed.data import ROOT, user
from llm_speed.sides import INSTALLED, OURS, SAME, Found, common_job, in_turn, parser
from llm_speed.tables import publish, verdict

from taurl.llm.data.datasets import PromptOrder, split
from taurl.llm.data.reasoning_tasks import reasoning_rows
from taurl.llm.models.loading import resolve_model

EXAMPLE = ROOT / "examples" / "grpo_arithmetic.yaml"
ASKED = {INSTALLED: 5, SAME: 3.5}  # times as long as taurl
HELD_OUT = 200


def main() -> None:
    options = parser(__doc__, steps=0)
    options.add_argument("--goal", type=float, default=0.6, help="accuracy on held-out questions to reach")
    options.add_argument("--every", type=int, default=10, help="updates between two evaluations")
    options = options.parse_args()
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    rows = reasoning_rows(example["dataset"].partition(":")[2], example["dataset_args"])
    train, held_out, _ = split(rows, HELD_OUT, 0)
    size = example["prompts_per_step"]
    job = common_job(options, resolve_model(options.model)) | {
        "kind": "grpo",
        "steps": example["steps"],
        "warm_up": 0,
        "rows_per_step": size * example["group_size"],
        "rows_per_part": size * example["group_size"] // 2,
        "tokens_per_part": example["tokens_per_part"],
        **{name: example[name] for name in ("group_size", "max_tokens", "learning_rate", "schedule")},
        "reward": "last_number",
        "rows": [question(row) for row in train],
        "order": PromptOrder(len(train), 0).take(0, size * example["steps"]),
        "held_out": [question(row) for row in held_out],
        "goal": options.goal,
        "every": options.every,
    }
    found = {name: runs[-1] for name, runs in in_turn(options, job).items()}
    title = f"Time to {options.goal:.2f} on the demo's task"
    text = [table(found, options.goal), verdict(missed(found, options.goal))]
    publish(options, title, job, text, lambda axis: draw(axis, found, options.goal))


def question(row: Found) -> Found:
    return {"prompt": user(row["prompt"]), "answer": row["answer"]}


def table(found: dict[str, Found], goal: float) -> str:
    """How long each side trained, and what it reached; a side that did not get there was slower than that by far."""
    heads = ["", f"accuracy of {goal:.2f}", "training s", "updates", "s an update", "taurl's speed", "asked"]
    lines, ours = [heads, ["---"] * len(heads)], found[OURS]["curve"][-1]
    for name, run in found.items():
        updates, seconds, accuracy = run["curve"][-1]
        cells = [name, f"{accuracy:.3f}", f"{seconds:.0f}", str(updates), f"{seconds / max(1, updates):.1f}", "", ""]
        if name != OURS and ours[2] >= goal:
            beyond = "" if accuracy >= goal else "> "
            cells[5:] = f"{beyond}{seconds / ours[1]:.2f} ×", f"≥ {ASKED[name]:g} ×"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def missed(found: dict[str, Found], goal: float) -> list[str]:
    """What was not reached, each in words: the goal by taurl, or times the speed of a peer that got there as well."""
    _, seconds, accuracy = found[OURS]["curve"][-1]
    if accuracy < goal:
        return [f"taurl came to {accuracy:.3f} in {seconds:.0f} s"]
    ends = {name: run["curve"][-1] for name, run in found.items() if name != OURS}
    return [
        f"{end[1] / seconds:.2f} times the speed of {name}, {ASKED[name]:g} asked"
        for name, end in ends.items()
        if end[2] >= goal and end[1] / seconds < ASKED[name]
    ]


def draw(axis: Any, found: dict[str, Found], goal: float) -> None:
    for name, run in found.items():
        _, seconds, accuracies = zip(*run["curve"], strict=True)
        axis.plot(seconds, accuracies, marker="o", markersize=4, label=name)
    axis.axhline(goal, color="#cbd5e1", linewidth=1, zorder=0)
    axis.set(xlabel="training time (s)", ylabel="accuracy on held-out questions", xlim=(0, None), ylim=(0, 1))
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
