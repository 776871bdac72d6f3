"""Sampling completions: one protocol, a slot sampler over the trainer's own weights, and a slow yardstick."""

from taurl.llm.generation.protocol import Completion, Generator, Sampling
from taurl.llm.generation.slots import SlotSampler, default_kv_memory_gb
from taurl.llm.generation.yardstick import TransformersSampler

__all__ = ["Completion", "Generator", "Sampling", "SlotSampler", "TransformersSampler", "default_kv_memory_gb"]
