"""`taurl llm grpo`: train, then show what changed."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from taurl.commands.options import parse, take_option
from taurl.llm.algorithms.grpo_config import GRPOConfig
from taurl.runtime.config import read_config

PROG = "taurl llm grpo"


def main(words: Sequence[str]) -> int:
    resume, words = take_option(words, "--resume")
    stored = read_config(Path(resume), GRPOConfig) if resume else None
    config = parse(GRPOConfig, words, prog=PROG, default=stored)

    from taurl.commands.summary import show_summary
    from taurl.llm.algorithms.grpo import GRPO
    from taurl.report import write_report
    from taurl.runtime.machine import keep_freed_memory

    keep_freed_memory()
    trainer = GRPO.resume(Path(resume), config) if resume else GRPO(config=config)
    try:
        trainer.train()
    except BaseException:
        with contextlib.suppress(Exception):  # the first failure is the one to tell
            write_report(trainer.run.directory)
        raise
    finally:
        trainer.rewards.close()
    write_report(trainer.run.directory)
    show_summary(trainer.run)
    return 0
