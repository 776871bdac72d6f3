"""`taurl llm generate`: complete the prompts of a file."""

import sys
from collections.abc import Sequence

from taurl.commands.answers import answers, require_new
from taurl.commands.options import parse
from taurl.llm.inference_config import GenerateConfig
from taurl.runtime.errors import InputError


def main(words: Sequence[str]) -> int:
    config = parse(GenerateConfig, words, prog="taurl llm generate")
    if config.prompts is None:
        raise InputError("no prompts given: name a .jsonl, .json, .csv or .parquet file with --prompts")
    require_new(config.out)

    from taurl.llm.data.chat import as_completion
    from taurl.llm.data.tasks import PromptReader
    from taurl.llm.evaluation import decode
    from taurl.llm.inference import Model
    from taurl.runtime.metrics import append_lines, print_lines

    model = Model(config)
    prompts = PromptReader.of(config, model.tokenizer, model.model).read(config.prompts)
    for name in ("completion", "finish"):
        if any(name in row for row in prompts.rows):
            raise InputError(f"the data has a column {name} already: keep it as --columns {name}=another_name")
    rows = iter(prompts.rows)
    for groups in answers(model, prompts.ids, config.count):
        records = [
            {
                **row,
                "completion": as_completion(row["prompt"], decode(model.tokenizer, completion.tokens)),
                "finish": completion.finish,
            }
            for group, row in zip(groups, rows, strict=False)
            for completion in group
        ]
        if config.out is not None:
            append_lines(config.out, records)
        else:
            print_lines(records)
    if config.out is not None:
        print(f"{len(prompts) * config.count} completions in {config.out}", file=sys.stderr)
    return 0
