"""The classic recipe on one CPU: SFT on 500 answers in an XML layout, then GRPO with the five XML rewards.

    python examples/xml_reasoning/run.py

The data is made here: sums of three numbers from reasoning-gym, worked out step by step. The second run's step 0 is
what SFT alone can do; runs/xml-grpo/report.html shows each reward's curve from there.
"""

import re

from taurl.llm import GRPO, SFT, GRPOConfig, SFTConfig
from taurl.llm.data.reasoning_tasks import reasoning_rows
from taurl.report import write_report
from taurl.runtime.machine import keep_freed_memory

MODEL = "smollm2-135m-instruct"
REWARDS = {  # with the most that each gives
    "xmlcount_reward_func": 0.5,
    "soft_format_reward_func": 0.5,
    "strict_format_reward_func": 0.5,
    "int_reward_func": 0.5,
    "correctness_reward_func": 2.0,
}
SFT_ROWS, GRPO_ROWS, HELD_OUT = 500, 1500, 200


def reasoned(question: str) -> str:
    """The sum of a question worked out from left to right, in the layout."""
    total, *rest = map(int, re.findall(r"\d+", question))
    lines = []
    for term in rest:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    body = "\n".join(lines)
    return f"<reasoning>\n{body}\n</reasoning>\n<answer>\n{total}\n</answer>\n"


def sums(size: int) -> list[dict[str, str]]:
    """The distinct sums among `size` questions, each with its answer in the layout."""
    arguments = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2, "size": size}
    distinct = {row["prompt"]: row for row in reasoning_rows("chain_sum", arguments) if " - " not in row["prompt"]}
    return [{"prompt": p, "completion": reasoned(p), "answer": row["answer"]} for p, row in distinct.items()]


def main() -> None:
    keep_freed_memory()
    rows = sums(12_000)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    answers, questions = rows[:SFT_ROWS], rows[SFT_ROWS : SFT_ROWS + GRPO_ROWS]

    sft = SFT(
        MODEL,
        answers,
        SFTConfig(
            out="runs/xml-sft",
            epochs=1,
            learning_rate=2e-5,  # the layout, and as little else as it takes
            schedule="linear",
            eval_rows=HELD_OUT,
            tokens_per_part=1024,
        ),
        eval_dataset=held_out,
    ).train()
    write_report(sft.run.directory)

    grpo = GRPO(
        str(sft.run.directory / "final"),
        [{"prompt": row["prompt"], "answer": row["answer"]} for row in questions],
        list(REWARDS),
        GRPOConfig(
            out="runs/xml-grpo",
            steps=40,
            prompts_per_step=12,
            group_size=8,
            max_tokens=64,
            learning_rate=3e-5,
            schedule="linear",
            eval_rows=HELD_OUT,
            eval_every=20,
            tokens_per_part=1024,
        ),
        eval_dataset=held_out,
    ).train()
    write_report(grpo.run.directory)
    first, *_, last = [record for record in grpo.run.records() if "eval/reward" in record]
    print(f"of the most that each reward gives, on {HELD_OUT} held-out questions:")
    for name, most in REWARDS.items():
        before, after = (record[f"eval/rewards/{name}/mean"] / most for record in (first, last))
        print(f"{name:28}  after SFT {before:.3f}   after GRPO {after:.3f}")
    print(f"report: {grpo.run.directory}/report.html")


if __name__ == "__main__":
    main()
