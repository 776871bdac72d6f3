"""The same numbers on another device: CPU in float64 against a GPU in float32 and bfloat16.

    python benchmarks/gpu_correctness.py [--device cuda] [--model smollm2-135m-instruct]

Log-probabilities and the gradient of a policy loss, of completions that share their prompts; the same of rows that lie
end to end, as supervised training has them (on a GPU in half precision by a kernel of its own); and the
log-probabilities that the sampler gives with what it draws, also with its steps recorded as CUDA graphs. Prints a
table; the exit status is 1 if a difference is above its bound.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taurl.llm.data.chat import encode_prompt
from taurl.llm.data.token_rows import TokenRow
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.llm.scoring.likelihood import completion_logprobs
from taurl.llm.scoring.row_attention import attending_within_rows
from taurl.llm.scoring.supervised import part_scores, row_parts
from taurl.runtime.machine import choose_device

QUESTIONS = ["What is 12 + 30?", "Tom has three boxes of nine pens. He gives four pens away. How many are left?"]
GROUP, TOKENS = 4, 32
# Of log-probabilities the mean difference in nats; of the gradient its relative difference in norm.
BOUNDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.1)}
Found = tuple[Tensor, Tensor]  # log-probabilities, and the gradient, flat


def shared(model: PreTrainedModel, prompts: list[list[int]], tokens: Tensor) -> Found:
    """Log-probabilities [N, L] of completions that share their prompts, and the gradient of their weighted mean."""
    prompt_of = torch.arange(len(prompts), device=model.device).repeat_interleave(GROUP)
    tokens = tokens.to(model.device)
    logprobs, _ = completion_logprobs(model, prompts, prompt_of, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return logprobs, gradient(model, logprobs)


def end_to_end(model: PreTrainedModel, prompts: list[list[int]], tokens: Tensor) -> Found:
    """The same of whole rows that lie end to end, of different lengths: [M], in the order of the part."""
    rows = []
    for place, completion in enumerate(tokens.tolist()):
        ids = prompts[place // GROUP] + completion[: TOKENS - 3 * place]
        rows.append(TokenRow(ids, [at >= len(prompts[place // GROUP]) for at in range(len(ids))]))
    (part,) = row_parts(rows, 10_000, model.device, packed=True)
    with attending_within_rows(model):
        logprobs = part_scores(model, part).logprobs
        return logprobs, gradient(model, logprobs)


def gradient(model: PreTrainedModel, logprobs: Tensor) -> Tensor:
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logprobs), device=logprobs.device, dtype=logprobs.dtype)
    (weights @ logprobs).sum().div(logprobs.numel()).backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


def differences(way: Callable[..., Found], models: list[PreTrainedModel], *given: object) -> tuple[float, float]:
    """How far the log-probabilities (mean, nats) and the gradient (relative) of two models are apart."""
    (found, steepness), (exact, expected) = (way(model, *given) for model in models)
    nats = float((found.detach().double().cpu() - exact.detach()).abs().mean())
    return nats, float((steepness - expected).norm() / expected.norm())


@torch.no_grad()
def sampled(
    model: PreTrainedModel, reference: PreTrainedModel, prompts: list[list[int]], *, graphs: bool
) -> tuple[Tensor, float]:
    """Sampled tokens [N, L], and how far the sampler's log-probabilities of them are from exact ones (mean, nats)."""
    sampler = SlotSampler(model, slots=GROUP * len(prompts), cuda_graphs=graphs)
    groups = sampler.generate(prompts, GROUP, Sampling(TOKENS))
    completions = [completion for group in groups for completion in group]
    tokens = torch.tensor([completion.tokens for completion in completions])
    of = torch.arange(len(prompts)).repeat_interleave(GROUP)
    exact, _ = completion_logprobs(reference, prompts, of, tokens, torch.ones_like(tokens, dtype=torch.bool))
    logprobs = torch.tensor([completion.logprobs for completion in completions], dtype=torch.float64)
    return tokens, float((logprobs - exact).abs().mean())


def with_graphs(model: PreTrainedModel, reference: PreTrainedModel, prompts: list[list[int]]) -> float:
    """The second of `sampled` with recorded steps; ∞ where recording fails, which is printed."""
    try:
        return sampled(model, reference, prompts, graphs=True)[1]
    except RuntimeError as error:
        print(f"recording CUDA graphs failed: {error}")
        return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    device, tokenizer = choose_device(options.device), load_tokenizer(options.model)
    prompts = [encode_prompt(question, tokenizer) for question in QUESTIONS]
    reference = load_model(options.model, dtype=torch.float64)
    failed = False
    heads = "prompts shared", "gradient", "rows end to end", "gradient", "sampler", "graphs", "bounds"
    print(f"| {device}, CPU float64 | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for dtype, (nats, relative) in BOUNDS.items():
        model = load_model(options.model, dtype=dtype, device=device)
        tokens, drawn = sampled(model, reference, prompts, graphs=False)
        pairs = [differences(way, [model, reference], prompts, tokens) for way in (shared, end_to_end)]
        recorded = with_graphs(model, reference, prompts) if device.type == "cuda" else None
        apart, steeper = (max(numbers) for numbers in zip(*pairs, strict=True))
        failed |= max(drawn, 0.0 if recorded is None else recorded, apart) > nats or steeper > relative
        cells = [f"{number:.1e}" for pair in pairs for number in pair]
        cells += [f"{drawn:.1e}", "–" if recorded is None else f"{recorded:.1e}"]
        print(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} | {nats:g} nats, {relative:g} |")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
