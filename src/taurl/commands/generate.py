"""`taurl llm generate`: complete the prompts of a file."""

import sys
from collections.abc import Sequence

from taurl.commands.options import parse
from taurl.llm.inference_config import GenerateConfig
from taurl.runtime.errors import InputError
from taurl.runtime.files import require_new


def main(words: Sequence[str]) -> int:
    config = parse(GenerateConfig, words, prog="taurl llm generate")
    if config.prompts is None:
        raise InputError("no prompts given: name a .jsonl, .json, .csv or .parquet file with --prompts")
    require_new(config.out)

    from taurl.llm.inference import generate
    from taurl.runtime.machine import keep_freed_memory
    from taurl.runtime.metrics import append_lines, print_lines

    keep_freed_memory()
    written = 0
    for row in generate(config.prompts, config):
        if config.out is not None:
            append_lines(config.out, [row])
        else:
            print_lines([row])
        written += 1
    if config.out is not None:
        print(f"{written} completions in {config.out}", file=sys.stderr)
    return 0
