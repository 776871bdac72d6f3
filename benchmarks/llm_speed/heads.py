"""Models to judge with: a random scalar head on a model's trunk."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification


def with_scalar_head(model: str, tokenizer: Any, folder: Path, lora_rank: int = 0) -> str:
    """Write a folder with a copy of the trunk and a scalar head, or with an adapter and a head. Returns its path."""
    torch.manual_seed(0)
    made: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    made.config.pad_token_id = tokenizer.pad_token_id
    if lora_rank:
        made = get_peft_model(made, LoraConfig(r=lora_rank, target_modules="all-linear", task_type="SEQ_CLS"))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
