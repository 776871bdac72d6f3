"""A model to judge with, which both sides start from."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification


def with_scalar_head(model: str, tokenizer: Any, folder: Path) -> str:
    """Write a folder with the same trunk and a random scalar head. Returns its path."""
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    made.config.pad_token_id = tokenizer.pad_token_id
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
