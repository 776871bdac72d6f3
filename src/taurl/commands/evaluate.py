"""`taurl llm evaluate`: scores of a model on a data set."""

import time
from collections.abc import Sequence

from rich.table import Table

from taurl.commands.options import parse
from taurl.llm.inference_config import EvaluateConfig
from taurl.runtime.errors import InputError
from taurl.runtime.files import require_new
from taurl.runtime.terminal import plain_console


def main(words: Sequence[str]) -> int:
    config = parse(EvaluateConfig, words, prog="taurl llm evaluate")
    if config.dataset is None:
        raise InputError("no data set given: name one with --dataset (for example reasoning-gym:chain_sum)")
    require_new(config.out)

    from taurl.llm.rewards import RewardSet

    rewards = RewardSet.of(config, config.rewards)  # a misspelt one is found before torch is imported

    from taurl.llm.data.tasks import PromptReader
    from taurl.llm.evaluation import described, evaluate, reward_columns
    from taurl.llm.generation import Completion
    from taurl.llm.inference import Model
    from taurl.runtime.files import write_whole
    from taurl.runtime.machine import keep_freed_memory
    from taurl.runtime.metrics import append_lines, json_line

    keep_freed_memory()
    model = Model(config)
    prompts = PromptReader.of(config, model.tokenizer, model.model).read(config.dataset, limit=config.rows)
    rewards.check_columns(reward_columns(prompts.rows))
    start = time.monotonic()
    completions: list[Completion] = []
    for groups in model.complete(prompts.ids):
        rows = prompts.rows[len(completions) :]
        completions += [group[0] for group in groups]
        if config.out is not None:  # without rewards until all are there, so that a reward that fails costs no answer
            append_lines(config.out, [described(r, g[0], model.tokenizer) for r, g in zip(rows, groups, strict=False)])
    try:
        found = evaluate(prompts.rows, completions, model.tokenizer, rewards)
    except InputError as error:
        if config.out is not None:
            error.add_note(f"the answers are in {config.out}, without rewards")
        raise
    finally:
        rewards.close()
    if config.out is not None:
        lines = "".join(json_line(sample) + "\n" for sample in found.samples)
        write_whole(config.out, lines.encode(errors="backslashreplace"))
    show(found.metrics, len(prompts), time.monotonic() - start)
    return 0


def show(metrics: dict[str, float], rows: int, seconds: float) -> None:
    """Print the figures as a table."""
    table = Table(title=f"{rows} rows in {seconds:.0f} s", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in metrics.items():
        if not name.endswith("/seconds"):
            table.add_row(name.removeprefix("eval/"), f"{value:.4g}")
    plain_console().print(table)
