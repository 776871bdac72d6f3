"""Reinforcement learning in gymnasium environments: `PPO("CartPole-v1").train()`.

`load("runs/NAME")` gives a policy, `evaluate_policy(policy, "CartPole-v1")` scores one.

Algorithms and their configs are imported when first asked for, so that importing the wing costs nothing.
"""

import importlib
from typing import Any

ALGORITHMS = {
    "QLearning": "q_learning",
    "DQN": "dqn",
    "REINFORCE": "reinforce",
    "A2C": "a2c",
    "TRPO": "trpo",
    "PPO": "ppo",
    "GRPO": "grpo",
}
OTHERS = {"load": "saved", "evaluate_policy": "trainer"}


def __dir__() -> list[str]:
    return [*OTHERS, *ALGORITHMS, *(f"{name}Config" for name in ALGORITHMS)]


def __getattr__(name: str) -> Any:
    if name in OTHERS:
        return getattr(importlib.import_module(f"{__name__}.{OTHERS[name]}"), name)
    config = name.removesuffix("Config")
    if config not in ALGORITHMS:
        known = ", ".join([*OTHERS, *ALGORITHMS])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {known}")
    module = ALGORITHMS[config] + ("_config" if name.endswith("Config") else "")
    return getattr(importlib.import_module(f"{__name__}.algorithms.{module}"), name)
