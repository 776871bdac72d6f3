"""The slot sampler: continuous batching over the trainer's own weights.

A fixed number of slots decode together. A prompt goes through the model once and is forked, by copying its keys and
values, to the slots of its completions; when a sequence ends, its slot goes to the next one waiting, so that no batch
waits for its longest member.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.generation.cache import SlotCache
from taurl.llm.generation.draw import draw, uniforms
from taurl.llm.generation.protocol import Completion, Sampling, check_prompts, ends
from taurl.llm.heads import body, output_head
from taurl.runtime.errors import InputError

COLUMN_STEP = 32  # attention sees a multiple of this many columns, so that kernels meet few distinct shapes
PREFILL_TOKENS = 4096  # prompt tokens, padding included, that go through the model together


@dataclass
class Running:
    """A sequence in a slot."""

    prompt: int
    completion: int
    prompt_length: int
    numbers: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def column(self) -> int:
        """Where the newest token's key and value go: the token was drawn, but has not been through the model."""
        return self.prompt_length + len(self.tokens) - 1


@dataclass
class Prefilled:
    """Prompts that have been through the model: their keys and values, and the logits after their last token."""

    rows: dict[int, int]
    cache: SlotCache
    logits: Tensor
    length: int


class SlotSampler:
    """Samples from a causal language model of `transformers`.

    Args:
        model: any model whose layers are full or sliding-window attention.
        stop_token_ids: tokens that end a completion.
        tokenizer: needed for stop strings only.
        slots: sequences that decode together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Iterable[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        slots: int = 64,
    ):
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.stop_token_ids = frozenset(stop_token_ids)
        self.config = model.config.get_text_config()
        self.window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:  # models from before layer types: a window, where there is one, holds for every layer
            kinds = ["sliding_attention" if self.window else "full_attention"]
        self.layer_kinds = sorted(set(kinds))
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise InputError(
                f"the slot sampler knows full and sliding-window attention, but {type(model).__name__} has layers of "
                f"kind {', '.join(sorted(unknown))}; use the generator 'transformers'"
            )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        sampling: Sampling,
        *,
        key: tuple[int, int] = (0, 0),
        on_token: Callable[[int, int, int], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`. For one number of slots the result is the same bit for bit, else up to rounding."""
        check_prompts(prompts, sampling, self.config.max_position_embeddings)
        self.body, self.head = body(self.model), output_head(self.model)
        slots = min(self.slots, len(prompts) * count)
        capacity = round_up(max(map(len, prompts), default=0) + sampling.max_tokens, COLUMN_STEP)
        cache = SlotCache(self.config.num_hidden_layers, slots, capacity)
        waiting = deque((prompt, completion) for prompt in range(len(prompts)) for completion in range(count))
        running: list[Running] = []
        prefilled: Prefilled | None = None
        done: dict[tuple[int, int], Completion] = {}

        def finish(sequences: list[Running], tokens: Tensor, logprobs: Tensor) -> list[bool]:
            """Note each sequence's new token; which of them end with it."""
            ended = []
            for sequence, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
                sequence.tokens.append(token)
                sequence.logprobs.append(logprob)
                if on_token:
                    on_token(sequence.prompt, sequence.completion, token)
                stopped = ends(sequence.tokens, self.stop_token_ids, sampling.stop, self.tokenizer)
                ended.append(stopped or len(sequence.tokens) == sampling.max_tokens)
                if ended[-1]:
                    done[sequence.prompt, sequence.completion] = Completion(
                        sequence.tokens, sequence.logprobs, "stop" if stopped else "length"
                    )
            return ended

        while waiting or running:
            while waiting and len(running) < slots:
                if prefilled is None or waiting[0][0] not in prefilled.rows:
                    prefilled = self._prefill(prompts, chunk(waiting, prompts, slots - len(running)))
                forks: list[Running] = []
                while waiting and len(running) + len(forks) < slots and waiting[0][0] in prefilled.rows:
                    prompt, completion = waiting.popleft()
                    own = uniforms(key, prompt, completion, sampling.max_tokens)
                    forks.append(Running(prompt, completion, len(prompts[prompt]), own))
                source = torch.tensor([prefilled.rows[fork.prompt] for fork in forks], device=self.model.device)
                ended = finish(forks, *draw(prefilled.logits[source], self._numbers(forks), sampling))
                stay = [i for i, end in enumerate(ended) if not end]
                if stay:
                    rows = torch.arange(len(running), len(running) + len(stay), device=self.model.device)
                    cache.copy_rows(prefilled.cache, source[stay], rows, prefilled.length)
                    running += [forks[i] for i in stay]
            if running:
                logits = self._decode(cache, running)
                ended = finish(running, *draw(logits, self._numbers(running), sampling))
                running = self._compact(cache, running, ended)
            if progress:
                progress(len(done), len(prompts) * count)
        return [[done[prompt, completion] for completion in range(count)] for prompt in range(len(prompts))]

    def _numbers(self, sequences: list[Running]) -> Tensor:
        """The uniform number of each sequence's next draw, float64 [R]."""
        return torch.tensor([s.numbers[len(s.tokens)] for s in sequences], dtype=torch.float64).to(self.model.device)

    def _prefill(self, prompts: Sequence[Sequence[int]], chosen: list[int]) -> Prefilled:
        """Put the chosen prompts through the model, padded on the right, from column 0."""
        lengths = torch.tensor([len(prompts[prompt]) for prompt in chosen])
        length = int(lengths.max())
        ids = torch.zeros(len(chosen), length, dtype=torch.long)
        for row, prompt in enumerate(chosen):
            ids[row, : len(prompts[prompt])] = torch.tensor(prompts[prompt])
        cache = SlotCache(self.config.num_hidden_layers, len(chosen), length)
        cache.place.view = length
        positions = torch.arange(length, device=self.model.device).expand(len(chosen), -1)
        hidden = self._forward(cache, ids.to(self.model.device), positions)
        last = hidden[torch.arange(len(chosen)), lengths - 1]
        return Prefilled({prompt: row for row, prompt in enumerate(chosen)}, cache, self.head(last), length)

    def _decode(self, cache: SlotCache, running: list[Running]) -> Tensor:
        """Put each running sequence's newest token through the model: logits [R, V] of the next."""
        device = self.model.device
        columns = torch.tensor([sequence.column for sequence in running])
        cache.place.columns = columns.to(device)
        cache.place.view = min(round_up(int(columns.max()) + 1, COLUMN_STEP), cache.place.capacity)
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in running]).to(device)
        return self.head(self._forward(cache, ids, columns[:, None].to(device))[:, -1])

    def _forward(self, cache: SlotCache, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [R, Q, d] of tokens [R, Q] at their positions, seeing the cache's columns up to their own."""
        columns = torch.arange(cache.place.view, device=ids.device)
        distance = positions[:, None, :, None] - columns  # [R, 1, Q, view]
        masks = {"full_attention": distance >= 0}
        if self.window:
            masks["sliding_attention"] = masks["full_attention"] & (distance < self.window)
        mask = masks[self.layer_kinds[0]] if len(self.layer_kinds) == 1 else masks
        output = self.body(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _compact(self, cache: SlotCache, running: list[Running], ended: list[bool]) -> list[Running]:
        """Keep the sequences that go on in rows 0, 1, …: the last ones move into the rows that came free."""
        left = len(running) - sum(ended)
        holes = [row for row in range(left) if ended[row]]
        movers = [row for row in range(left, len(running)) if not ended[row]]
        if holes:
            device = self.model.device
            cache.copy_rows(cache, torch.tensor(movers).to(device), torch.tensor(holes).to(device), cache.place.view)
        kept = running[:left]
        for hole, mover in zip(holes, movers, strict=True):
            kept[hole] = running[mover]
        return kept


def chunk(waiting: Iterable[tuple[int, int]], prompts: Sequence[Sequence[int]], free: int) -> list[int]:
    """The next prompts to prefill: those that the free slots can start on, as many as PREFILL_TOKENS allow."""
    chosen: list[int] = []
    longest = 0
    for _, (prompt, _) in zip(range(free), waiting, strict=False):
        if prompt in chosen:
            continue
        longest = max(longest, len(prompts[prompt]))
        if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
            break
        chosen.append(prompt)
    return chosen


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step
