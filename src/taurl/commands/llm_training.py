"""`taurl llm ALGORITHM`: train, then show what changed."""

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from taurl.commands.options import RESUMING, parse, take_option
from taurl.commands.training import stored, train_and_report
from taurl.llm import LAZY


def train(name: str, words: Sequence[str]) -> int:
    """Train with the algorithm of that class name; its command is the name in small letters."""
    config_class = _named(f"{name}Config")
    resume, words = take_option(words, "--resume")
    default = stored(Path(resume), name.lower(), config_class) if resume else None
    config = parse(config_class, words, prog=f"taurl llm {name.lower()}", default=default, more=RESUMING)

    from taurl.commands.summary import show_summary
    from taurl.runtime.machine import keep_freed_memory

    keep_freed_memory()
    trainer_class = _named(name)
    trainer = trainer_class.resume(Path(resume), config) if resume else trainer_class(config=config)
    try:
        train_and_report(trainer)
    finally:
        trainer.close()
    show_summary(trainer.run)
    return 0


def _named(name: str) -> Any:
    return getattr(importlib.import_module(LAZY[name]), name)


dpo = partial(train, "DPO")
grpo = partial(train, "GRPO")
sft = partial(train, "SFT")
ppo = partial(train, "PPO")
reward = partial(train, "Reward")
