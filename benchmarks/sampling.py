"""Sampling speed: the slot sampler against `model.generate`, in one run, on SmolLM2-135M-Instruct.

    python benchmarks/sampling.py [--prompts 32] [--tokens 64]

Both sample at temperature 1 from the same prompts, with the same weights, precision, threads and allocator settings;
generate gets them as one padded batch. Prints tokens a second and the ratio; the best of three rounds counts.
"""

import argparse
import time

import torch

from taurl.llm.chat import encode_prompt, stop_token_ids
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.likelihood import pad_left
from taurl.llm.models import load_model, load_tokenizer
from taurl.llm.reasoning_tasks import reasoning_rows
from taurl.runtime.machine import choose_precision, keep_freed_memory, set_threads

MODEL = "smollm2-135m-instruct"


def best(work, rounds: int = 3) -> float:
    """Most tokens a second over some rounds."""
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        tokens = work()
        rates.append(tokens / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    allocator, threads = keep_freed_memory(), set_threads(None)
    dtype = choose_precision("auto", torch.device("cpu"))
    model, tokenizer = load_model(MODEL, dtype=dtype), load_tokenizer(MODEL)
    rows = reasoning_rows("chain_sum", {"size": options.prompts, "seed": 1})
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in rows]
    sampler = SlotSampler(model, stop_token_ids=stop_token_ids(model, tokenizer), slots=options.prompts)
    sampling = Sampling(options.tokens, temperature=1.0)
    ids, real = pad_left(prompts, torch.device("cpu"))

    def slots() -> int:
        return sum(len(group[0].tokens) for group in sampler.generate(prompts, 1, sampling))

    def generate() -> int:
        torch.manual_seed(0)
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=real.long(), do_sample=True, top_k=0, top_p=1.0,
                                    max_new_tokens=options.tokens)  # fmt: skip
        ended = (output[:, ids.shape[1] :] == model.generation_config.pad_token_id).sum().item()
        return output[:, ids.shape[1] :].numel() - ended

    ours, theirs = best(slots), best(generate)
    print(
        f"{options.prompts} prompts × {options.tokens} tokens, {dtype}, {threads} threads, allocator set: {allocator}"
    )
    print(f"slot sampler    {ours:7.0f} tokens/s")
    print(f"model.generate  {theirs:7.0f} tokens/s")
    print(f"ratio           {ours / theirs:7.2f}")


if __name__ == "__main__":
    main()
