"""taurl: reinforcement learning from tabular Q-learning to GRPO on language models."""

__version__ = "0.1.0"
