"""Post-training of language models.

from taurl.llm import GRPO, GRPOConfig, generate
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taurl.llm.algorithms.dpo import DPO
    from taurl.llm.algorithms.dpo_config import DPOConfig
    from taurl.llm.algorithms.grpo import GRPO
    from taurl.llm.algorithms.grpo_config import GRPOConfig
    from taurl.llm.algorithms.ppo import PPO
    from taurl.llm.algorithms.ppo_config import PPOConfig
    from taurl.llm.algorithms.reward import Reward
    from taurl.llm.algorithms.reward_config import RewardConfig
    from taurl.llm.algorithms.sft import SFT
    from taurl.llm.algorithms.sft_config import SFTConfig
    from taurl.llm.inference import generate
    from taurl.llm.inference_config import GenerateConfig

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "SFT",
    "DPOConfig",
    "GRPOConfig",
    "GenerateConfig",
    "PPOConfig",
    "Reward",
    "RewardConfig",
    "SFTConfig",
    "generate",
]

# Imported when first asked for: a config needs no torch.
LAZY = {
    "DPO": "taurl.llm.algorithms.dpo",
    "DPOConfig": "taurl.llm.algorithms.dpo_config",
    "GRPO": "taurl.llm.algorithms.grpo",
    "GRPOConfig": "taurl.llm.algorithms.grpo_config",
    "GenerateConfig": "taurl.llm.inference_config",
    "PPO": "taurl.llm.algorithms.ppo",
    "PPOConfig": "taurl.llm.algorithms.ppo_config",
    "Reward": "taurl.llm.algorithms.reward",
    "RewardConfig": "taurl.llm.algorithms.reward_config",
    "SFT": "taurl.llm.algorithms.sft",
    "SFTConfig": "taurl.llm.algorithms.sft_config",
    "generate": "taurl.llm.inference",
}


def __dir__() -> list[str]:
    return list(__all__)


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
