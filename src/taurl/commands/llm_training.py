"""`taurl llm ALGORITHM`: train, then show what changed."""

import contextlib
import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from taurl.commands.options import RESUMING, parse, take_option
from taurl.llm import LAZY
from taurl.runtime.config import read_config


def train(name: str, words: Sequence[str]) -> int:
    """Train with the algorithm of that class name; its command is the name in small letters."""
    config_class = _named(f"{name}Config")
    resume, words = take_option(words, "--resume")
    stored = _stored(Path(resume), name, config_class) if resume else None
    config = parse(config_class, words, prog=f"taurl llm {name.lower()}", default=stored, more=RESUMING)

    from taurl.commands.summary import show_summary
    from taurl.report import write_report
    from taurl.runtime.machine import keep_freed_memory

    keep_freed_memory()
    trainer_class = _named(name)
    trainer = trainer_class.resume(Path(resume), config) if resume else trainer_class(config=config)
    try:
        trainer.train()
    except BaseException:
        with contextlib.suppress(Exception):  # the first failure is the one to tell
            write_report(trainer.run.directory)
        raise
    finally:
        trainer.close()
    write_report(trainer.run.directory)
    show_summary(trainer.run)
    return 0


def _stored(directory: Path, name: str, config_class: Any) -> Any:
    from taurl.runtime.directory import require_algorithm

    require_algorithm(directory, name.lower())
    return read_config(directory, config_class)


def _named(name: str) -> Any:
    return getattr(importlib.import_module(LAZY[name]), name)


dpo = partial(train, "DPO")
grpo = partial(train, "GRPO")
sft = partial(train, "SFT")
ppo = partial(train, "PPO")
reward = partial(train, "Reward")
