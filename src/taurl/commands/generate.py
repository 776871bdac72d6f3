"""`taurl llm generate`: complete the prompts of a file."""

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from taurl.commands.options import new_file, parse
from taurl.llm.inference_config import GenerateConfig
from taurl.runtime.errors import InputError


def main(words: Sequence[str]) -> int:
    config = parse(GenerateConfig, words, prog="taurl llm generate")
    if config.prompts is None:
        raise InputError("no prompts given: name a .jsonl, .json, .csv or .parquet file with --prompts")

    from taurl.llm.chat import as_completion
    from taurl.llm.evaluation import decode
    from taurl.llm.inference import Model
    from taurl.runtime.metrics import append_lines

    model = Model(config)
    reader = model.reader()
    rows = reader.rows(config.prompts)
    prompts = reader.encode(rows)
    if config.out is not None:
        new_file(config.out)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("completing", total=len(rows) * config.count)
        groups = model.generator.generate(
            prompts,
            config.count,
            model.sampling,
            key=(config.seed, 0),
            progress=lambda done, count: progress.update(task, completed=done),
        )
    answers = [
        {**row, "completion": as_completion(row["prompt"], decode(model.tokenizer, completion.tokens))}
        for row, group in zip(rows, groups, strict=True)
        for completion in group
    ]
    if config.out is not None:
        append_lines(config.out, answers)
        print(f"{len(answers)} completions in {config.out}", file=sys.stderr)
    else:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False))
    return 0
