"""`taurl control ALGORITHM`: train a policy in a gymnasium environment."""

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from taurl.commands.control_play import figures
from taurl.commands.options import RESUMING, parse, take_option
from taurl.commands.training import stored, train_and_report
from taurl.control import ALGORITHMS
from taurl.control.presets import preset
from taurl.runtime.config import read_yaml, validated
from taurl.runtime.errors import InputError
from taurl.runtime.terminal import plain_console

NO_PRESET = "\n    --no-preset leaves out the settings tuned for the environment."


def train(name: str, words: Sequence[str]) -> int:
    """Train with the algorithm of that class name."""
    module = ALGORITHMS[name]
    config_class = getattr(importlib.import_module(f"taurl.control.algorithms.{module}_config"), f"{name}Config")
    command = module.replace("_", "-")
    resume, words = take_option(words, "--resume")
    no_preset, words = "--no-preset" in words, [word for word in words if word != "--no-preset"]
    default = stored(Path(resume), command, config_class) if resume else None
    tuned = None if resume or no_preset else preset(command, environment_of(words))
    if tuned is not None:
        default = validated(config_class, read_yaml(tuned), source=str(tuned))
    config = parse(config_class, words, prog=f"taurl control {command}", default=default, more=RESUMING + NO_PRESET)
    if config.env is None and not resume:
        raise InputError(f"no environment given: taurl control {command} --env CartPole-v1")

    from taurl.runtime.machine import keep_freed_memory

    keep_freed_memory()
    if tuned is not None:
        said = f"settings tuned for {tuned.stem} ({command}); options win, --no-preset leaves them out"
        plain_console(stderr=True).print(said, style="dim", soft_wrap=True)
    trainer_class = getattr(importlib.import_module(f"taurl.control.algorithms.{module}"), name)
    trainer = trainer_class.resume(Path(resume), config) if resume else trainer_class(config=config)
    train_and_report(trainer)
    show(trainer.run)
    return 0


def environment_of(words: Sequence[str]) -> str | None:
    """The environment that the options name, or else their --config."""
    env, file = (take_option(words, name)[0] for name in ("--env", "--config"))
    if env is None and file is not None:
        env = read_yaml(Path(file)).get("env")
    return env if isinstance(env, str) else None


def show(run: object) -> None:
    """The last evaluation, wall time, and where everything is."""
    from taurl.commands.summary import show_places
    from taurl.runtime.run import Run

    assert isinstance(run, Run)
    console = plain_console()
    evaluations = [record for record in run.records() if "eval/mean_reward" in record]
    if evaluations:
        last = evaluations[-1]
        mean, spread = figures(last["eval/mean_reward"], last["eval/std_reward"])
        episodes = run.config.model_dump()["eval_episodes"]
        console.print(f"return         {mean} ± {spread} over {episodes:,} episodes")
        best = max(evaluations, key=lambda record: record["eval/mean_reward"])
        if best["eval/mean_reward"] > last["eval/mean_reward"]:
            mean, spread = figures(best["eval/mean_reward"], best["eval/std_reward"])
            said = f"best           {mean} ± {spread} at step {best['step']:,}: {run.directory / 'best'}"
            console.print(said, soft_wrap=True)
    show_places(run, "policy")


q_learning = partial(train, "QLearning")
dqn = partial(train, "DQN")
reinforce = partial(train, "REINFORCE")
a2c = partial(train, "A2C")
trpo = partial(train, "TRPO")
ppo = partial(train, "PPO")
grpo = partial(train, "GRPO")
