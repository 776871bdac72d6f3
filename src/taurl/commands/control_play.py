"""`taurl control evaluate RUN` and `taurl control play RUN`: use a policy without training it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taurl.commands.options import parse
from taurl.control.play_config import EvaluateConfig, PlayConfig
from taurl.runtime.errors import InputError
from taurl.runtime.files import require_new
from taurl.runtime.terminal import plain_console


def take_run(words: Sequence[str], command: str) -> tuple[Path, list[str]]:
    """The run directory, which stands first, and the options after it."""
    if not words or words[0].startswith("-"):
        if {"-h", "--help"} & set(words):
            return Path(), list(words)
        found = f"; the run stands first, and not {words[0]}" if words else ""
        raise InputError(f"no run given: taurl control {command} runs/NAME{found}")
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
        vectorization=policy.facts.get("vectorization", "auto"),
        deterministic=not config.sampled,
    )
    show_evaluation(found.returns, found.lengths)
    if (steps := policy.facts.get("steps")) is not None:  # fewer than asked where the run was interrupted
        plain_console().print(f"{'policy':<14} after {steps:,} steps")
    say_cut(found)
    return 0


def say_cut(found: Any) -> None:
    """Say where episodes (of an `Evaluation`) were cut."""
    if found.cut:
        from taurl.control.evaluation import cut_short

        plain_console(stderr=True).print(cut_short(found), style="yellow", soft_wrap=True)


def show_evaluation(returns: Sequence[float], lengths: Sequence[int]) -> None:
    """Print the figures of episodes that were played."""
    import numpy as np

    from taurl.control.evaluation import PERCENTILES

    found = (np.mean(returns), np.std(returns), min(returns), max(returns), *np.percentile(returns, PERCENTILES))
    mean, spread, low, high, *percentiles = figures(*map(float, found))
    lines = {
        "return": f"{mean} ± {spread}",
        "percentiles": ", ".join(f"{p}%: {value}" for p, value in zip(PERCENTILES, percentiles, strict=True)),
        "least, most": f"{low}, {high}",
        "length": figures(float(np.mean(lengths)))[0],
        "episodes": f"{len(returns):,}",
    }
    for name, text in lines.items():
        plain_console().print(f"{name:<14} {text}", soft_wrap=True)


def figures(*values: float) -> list[str]:
    """Figures of one kind, with as many decimals as give the largest of them four digits, and at most three."""
    size = max(map(abs, values)) or 1.0
    decimals = min(3, max(0, 3 - math.floor(math.log10(size))))
    return [f"{value:,.{decimals}f}" for value in values]


def play(words: Sequence[str]) -> int:
    run, words = take_run(words, "play")
    config = parse(PlayConfig, words, prog="taurl control play RUN")
    if (config.video is None) == (config.render is None):
        raise InputError("give either --video FILE.mp4 (or .gif) or --render human")
    require_new(config.video)
    policy, env = load(run)

    from taurl.control import playing

    found = playing.play(
        policy,
        env,
        policy.facts["env_args"],
        video=config.video,
        episodes=config.episodes,
        seed=config.seed,
        sampled=config.sampled,
    )
    console = plain_console()
    for number, total in enumerate(figures(*found.returns), 1):
        console.print(f"episode {number}: return {total}")
    if config.video:
        console.print(f"video: {config.video}", soft_wrap=True)
    say_cut(found)
    return 0


def load(run: Path) -> tuple[Any, str]:
    """The policy of a run directory or of a folder that a policy was saved to, and its environment's id."""
    from taurl.control.saved import load as load_policy

    policy = load_policy(run)
    env = policy.facts.get("env")
    if env is None:
        raise InputError(
            f"{run}: its environment came from Python; there, with make the function that makes it and policy = "
            f"taurl.control.load({str(run)!r}), taurl.control.evaluate_policy(policy, make, 100) scores it, and "
            "taurl.control.playing.play(policy, make, ...) shows it"
        )
    return policy, env
