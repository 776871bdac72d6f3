"""`taurl control evaluate RUN` and `taurl control play RUN`: use a policy without training it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from taurl.commands.options import parse
from taurl.control.play_config import EvaluateConfig, PlayConfig
from taurl.runtime.errors import InputError


def take_run(words: Sequence[str], command: str) -> tuple[Path, list[str]]:
    """The run directory, which stands first, and the options after it."""
    if not words or words[0].startswith("-"):
        if {"-h", "--help"} & set(words):
            return Path(), list(words)
        raise InputError(f"no run given: taurl control {command} runs/NAME")
    return Path(words[0]), list(words[1:])


def evaluate(words: Sequence[str]) -> int:
    run, words = take_run(words, "evaluate")
    config = parse(EvaluateConfig, words, prog="taurl control evaluate RUN")
    policy, env = load(run)

    from taurl.control.trainer import evaluate_policy

    found = evaluate_policy(
        policy,
        env,
        config.episodes,
        seed=config.seed,
        arguments=policy.facts["env_args"],
        deterministic=not config.sampled,
    )
    console = Console()
    for name, value in found.metrics().items():
        console.print(f"{name.removeprefix('eval/'):<16} {value:.2f}", highlight=False)
    return 0


def play(words: Sequence[str]) -> int:
    run, words = take_run(words, "play")
    config = parse(PlayConfig, words, prog="taurl control play RUN")
    if (config.video is None) == (config.render is None):
        raise InputError("give either --video FILE.mp4 (or .gif) or --render human")
    policy, env = load(run)

    from taurl.control import playing

    returns = playing.play(
        policy,
        env,
        policy.facts["env_args"],
        video=config.video,
        episodes=config.episodes,
        seed=config.seed,
        sampled=config.sampled,
    )
    console = Console()
    for number, total in enumerate(returns, 1):
        console.print(f"episode {number}: return {total:.1f}", highlight=False)
    if config.video:
        console.print(f"video: {config.video}", highlight=False, soft_wrap=True)
    return 0


def load(run: Path) -> tuple[Any, str]:
    """The policy of a run directory or of a folder that a policy was saved to, and its environment's id."""
    from taurl.control.saved import load_policy

    policy = load_policy(run)
    env = policy.facts.get("env")
    if env is None:
        raise InputError(f"{run}: its environment came from Python as an object; evaluate it from Python")
    return policy, env
