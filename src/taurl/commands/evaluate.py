"""`taurl llm evaluate`: scores of a model on a data set."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from taurl.commands.options import new_file, parse
from taurl.llm.inference_config import EvaluateConfig
from taurl.runtime.errors import InputError


def main(words: Sequence[str]) -> int:
    config = parse(EvaluateConfig, words, prog="taurl llm evaluate")
    if config.dataset is None:
        raise InputError("no data set given: name one with --dataset (for example reasoning-gym:chain_sum)")

    from taurl.llm.rewards import RewardSet

    rewards = RewardSet(config.rewards, config.reward_weights)
    from taurl.llm.datasets import columns_of
    from taurl.llm.evaluation import evaluate
    from taurl.llm.inference import Model
    from taurl.runtime.metrics import append_lines

    model = Model(config)
    reader = model.reader(config.dataset_args)
    rows = reader.rows(config.dataset)[: config.rows]
    rewards.check_columns(columns_of(rows))
    prompts = reader.encode(rows)
    if config.out is not None:
        new_file(config.out)
    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answering", total=len(rows))
        found = evaluate(
            model.generator,
            model.tokenizer,
            rows,
            prompts,
            rewards,
            model.sampling,
            progress=lambda done, count: progress.update(task, completed=done),
        )
    rewards.close()
    if config.out is not None:
        append_lines(config.out, found.samples)
    show(found.metrics, len(rows), time.monotonic() - start)
    return 0


def show(metrics: dict[str, float], rows: int, seconds: float) -> None:
    """Print the figures as a table."""
    table = Table(title=f"{rows} rows in {seconds:.0f} s", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in metrics.items():
        if not name.endswith("/seconds"):
            table.add_row(name.removeprefix("eval/"), f"{value:.4g}")
    Console().print(table)
