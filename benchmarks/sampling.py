"""Sampling speed: the slot sampler against `model.generate`, in turn, in one call, on SmolLM2-135M-Instruct.

    python benchmarks/sampling.py [--rows 32x64 64x64 stops] [--rounds 5] [--precision float32]
                                    [--device cuda] [--cuda-graphs]

Same weights, precision and threads, temperature 1. Rows: 32 and 64 prompts of 64 tokens with 64 new tokens each, none
of which ends a sequence; and 8 questions × 8 answers that end where the model ends them, at 256 tokens at most.
generate gets one padded batch, once in a process as installed and once in one with taurl's allocator settings, so that
the second ratio shows what is the sampler's own. Prints medians of tokens a second (padding after an answer's end is
not counted), the ratios, each process's peak memory, the versions and the machine.
"""

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from taurl.llm.data.chat import encode_prompt, stop_token_ids
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.models.loading import load_model, load_tokenizer
from taurl.llm.scoring.likelihood import pad_left
from taurl.runtime.machine import (
    choose_device,
    choose_precision,
    describe_machine,
    keep_freed_memory,
    peak_memory_gb,
    set_threads,
)

MODEL = "smollm2-135m-instruct"
ROWS = ["32x64", "64x64", "stops"]
ASKED = 5, 3  # times the speed of generate, as installed and under the same allocator, in bfloat16 with AMX
QUESTIONS = [
    "What is 2 + 3?",
    "Say hello in French.",
    "Name three colours of the rainbow, one a line.",
    "Which planet is the largest?",
    "What does a bee make, and of what?",
    "Write two sentences about the sea.",
    "Explain what a prime number is to a child.",
    "Tell a short story of a fox and a crow.",
]


@dataclass(frozen=True)
class Work:
    """What is sampled: `count` completions of each prompt, up to `tokens` tokens, with the model's stops or none."""

    prompts: list[list[int]]
    count: int
    tokens: int
    stops: list[int]


class Sampler:
    """Model and samplers of one process."""

    def __init__(self, allocator: bool, precision: str, device: str, graphs: bool):
        if allocator and not keep_freed_memory():
            print("this C library does not take the allocator's settings")
        self.threads = set_threads(None)
        self.device = choose_device(device)
        self.dtype = choose_precision(precision, self.device)
        self.model: Any = load_model(MODEL, dtype=self.dtype, device=self.device)
        self.tokenizer, self.graphs = load_tokenizer(MODEL), graphs

    def work(self, row: str) -> Work:
        if row == "stops":
            prompts = [encode_prompt([{"role": "user", "content": text}], self.tokenizer) for text in QUESTIONS]
            return Work(prompts, 8, 256, sorted(stop_token_ids(self.model, self.tokenizer)))
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(100, 40_000, (int(row.split("x")[0]), 64), generator=generator).tolist()
        return Work(prompts, 1, 64, [])

    def slots(self, work: Work, number: int) -> list[int]:
        """Lengths of the completions."""
        sampler = SlotSampler(self.model, stop_token_ids=work.stops, slots=64, cuda_graphs=self.graphs)
        groups = sampler.generate(work.prompts, work.count, Sampling(work.tokens), key=(0, number))
        return [len(completion.tokens) for group in groups for completion in group]

    @torch.inference_mode()
    def generate(self, work: Work, number: int) -> list[int]:
        torch.manual_seed(number)
        ids, real = pad_left([prompt for prompt in work.prompts for _ in range(work.count)], self.device)
        self.model.generation_config.eos_token_id = work.stops or None
        output = self.model.generate(
            ids,
            attention_mask=real.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=work.tokens,
            pad_token_id=0,
        )
        ended = torch.isin(output[:, ids.shape[1] :], torch.tensor(work.stops, device=self.device)).long().cumsum(1)
        before = torch.nn.functional.pad(ended[:, :-1], (1, 0)) == 0  # up to the first stop token, itself included
        lengths: list[int] = before.sum(1).tolist()
        return lengths


def serve(connection: Connection, allocator: bool, precision: str, device: str, graphs: bool) -> None:
    """Answer requests (row, side, round) with lengths, seconds and the peak memory so far, until there is None."""
    sampler = Sampler(allocator, precision, device, graphs)
    connection.send(f"{sampler.device}, {sampler.dtype}, {sampler.threads} threads")
    while request := connection.recv():
        row, side, number = request
        work = sampler.work(row)
        start = time.perf_counter()
        lengths = getattr(sampler, side)(work, number)
        connection.send((lengths, time.perf_counter() - start, peak_memory_gb(sampler.device)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cuda-graphs", action="store_true", help="record the sampler's steps")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    # One process a side, so that each has its own peak memory.
    sides = {"taurl": ("slots", True), "installed": ("generate", False), "allocator": ("generate", True)}
    processes = {}
    for name, (_, allocator) in sides.items():
        here, there = context.Pipe()
        settings = there, allocator, options.precision, options.device, options.cuda_graphs
        context.Process(target=serve, args=settings, daemon=True).start()
        processes[name] = here
        setting = here.recv()
    facts = describe_machine()
    print(f"{setting}; torch {torch.__version__}, transformers {transformers.__version__}, Python {facts['python']};")
    print(f"{facts['cpu']}; medians of {options.rounds} rounds, tokens a second\n")
    peaks: dict[str, float] = {}
    installed, same = (f"ratio (asked {ratio})" for ratio in ASKED)
    print(f"| row | taurl | generate, as installed | {installed} | generate, same allocator | {same} | lengths |")
    print("|---|---|---|---|---|---|---|")
    for row in options.rows:
        rates: dict[str, list[float]] = {name: [] for name in sides}
        ours: list[int] = []
        for number in range(options.rounds + (row != "stops")):  # a first round to warm up; answers are long enough
            for name, (side, _) in sides.items():
                processes[name].send((row, side, number))
                lengths, seconds, peaks[name] = processes[name].recv()
                rates[name].append(sum(lengths) / seconds)
                ours += lengths if name == "taurl" else []
        found = [statistics.median(values[-options.rounds :]) for values in rates.values()]
        cells = [f"{found[0]:.0f}", f"{found[1]:.0f}", f"{found[0] / found[1]:.2f}"]
        cells += [f"{found[2]:.0f}", f"{found[0] / found[2]:.2f}"]
        print(
            f"| {row} | {' | '.join(cells)} | {min(ours)}…{max(ours)}, mean {statistics.mean(ours):.0f} |", flush=True
        )
    for process in processes.values():
        process.send(None)
    print("\npeak memory, GB: " + ", ".join(f"{name} {peak:.1f}" for name, peak in peaks.items()))


if __name__ == "__main__":
    main()
