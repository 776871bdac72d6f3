"""The same numbers on another device: CPU in float64 against a GPU in float32 and bfloat16.

    python benchmarks/gpu_correctness.py [--device cuda] [--model smollm2-135m-instruct]

Log-probabilities and the gradient of a policy loss, of completions that share their prompts, and the log-probabilities
that the sampler gives with what it draws. Prints a table; the exit status is 1 if a difference is above its bound.
"""

import argparse

import torch
from torch import Tensor

from taurl.llm.data.chat import encode_prompt
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.llm.scoring.likelihood import completion_logprobs
from taurl.runtime.machine import choose_device

QUESTIONS = ["What is 12 + 30?", "Tom has three boxes of nine pens. He gives four pens away. How many are left?"]
GROUP, TOKENS = 4, 32
# Of log-probabilities the mean difference in nats; of the gradient its relative difference in norm.
BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.1)}


def gradient(model: torch.nn.Module, prompts: list[list[int]], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, L] of completions under a model, and the gradient of their mean weighted by row, flat."""
    device = next(model.parameters()).device
    prompt_of = torch.arange(len(prompts), device=device).repeat_interleave(GROUP)
    tokens = tokens.to(device)
    logprobs, _ = completion_logprobs(model, prompts, prompt_of, tokens, torch.ones_like(tokens, dtype=torch.bool))
    weights = torch.linspace(-1, 1, len(tokens), device=device)[:, None]
    (weights * logprobs).mean().backward()
    flat = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    return logprobs.detach().double().cpu(), flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    device, tokenizer = choose_device(options.device), load_tokenizer(options.model)
    prompts = [encode_prompt(question, tokenizer) for question in QUESTIONS]
    reference = load_model(options.model, dtype=torch.float64)
    failed = False
    print(f"| {device} against CPU float64 | log-probabilities, nats | gradient | sampler, nats |\n|---|---|---|---|")
    for dtype, (nats, relative) in BOUNDS.items():
        model = load_model(options.model, dtype=dtype, device=device)
        groups = SlotSampler(model, slots=GROUP * len(prompts)).generate(prompts, GROUP, Sampling(TOKENS))
        completions = [completion for group in groups for completion in group]
        tokens = torch.tensor([completion.tokens for completion in completions])
        sampler = torch.tensor([completion.logprobs for completion in completions], dtype=torch.float64)
        reference.zero_grad()
        exact, exact_gradient = gradient(reference, prompts, tokens)
        found, found_gradient = gradient(model, prompts, tokens)
        differences = [float((found - exact).abs().mean()), float((sampler - exact).abs().mean())]
        steeper = float((found_gradient - exact_gradient).norm() / exact_gradient.norm())
        failed |= max(differences) > nats or steeper > relative
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {differences[0]:.1e} (≤ {nats:g}) | {steeper:.1e} (≤ {relative:g}) | {differences[1]:.1e} |")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
