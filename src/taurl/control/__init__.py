"""Reinforcement learning in gymnasium environments: `PPO("CartPole-v1").train()`; `load("runs/NAME")` gives a policy.

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


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module(f"{__name__}.saved").load
    config = name.removesuffix("Config")
    if config not in ALGORITHMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has load, {', '.join(ALGORITHMS)}")
    module = ALGORITHMS[config] + ("_config" if name.endswith("Config") else "")
    return getattr(importlib.import_module(f"{__name__}.algorithms.{module}"), name)
