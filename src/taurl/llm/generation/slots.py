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
from taurl.llm.generation.protocol import Completion, Sampling, check_prompts, context_length, ends
from taurl.llm.generation.slot_model import SlotModel
from taurl.llm.heads import evaluating
from taurl.runtime.errors import InputError

PREFILL_TOKENS = 4096  # prompt tokens, padding included, that go through the model together


class SlotSampler:
    """Samples from a causal language model of `transformers`, in evaluation mode.

    Args:
        model: any model whose layers are full or sliding-window attention.
        stop_token_ids: tokens that end a completion.
        tokenizer: needed for stop strings only.
        slots: sequences that decode together.
    Raises: InputError for a model with other layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Iterable[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        slots: int = 64,
    ):
        if slots < 1:
            raise InputError(f"slots is {slots}, expected at least 1")
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.stop_token_ids = frozenset(stop_token_ids)
        self.slot_model = SlotModel(model)

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
        check_prompts(prompts, sampling, context_length(self.model))
        batch = Batch(self, prompts, count, sampling, key, on_token)
        with evaluating(self.model):
            while batch.waiting or batch.running:
                batch.fill()
                batch.decode()
                if progress:
                    progress(len(batch.done), len(prompts) * count)
        return [[batch.done[prompt, completion] for completion in range(count)] for prompt in range(len(prompts))]


@dataclass
class Draft:
    """A completion in the making, and the uniform numbers of its draws."""

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
    """Prompts that have been through the model: the row of each, their keys and values, the logits that follow."""

    rows: dict[int, int]
    cache: SlotCache
    logits: Tensor


class Batch:
    """One call of `generate`: which completions wait, which run (draft i in row i of the cache), which are done."""

    def __init__(
        self,
        sampler: SlotSampler,
        prompts: Sequence[Sequence[int]],
        count: int,
        sampling: Sampling,
        key: tuple[int, int],
        on_token: Callable[[int, int, int], None] | None,
    ):
        self.sampler, self.prompts, self.sampling, self.on_token = sampler, prompts, sampling, on_token
        self.model, self.device = sampler.slot_model, sampler.model.device
        self.waiting = deque(
            Draft(prompt, completion, len(ids), uniforms(key, prompt, completion, sampling.max_tokens))
            for prompt, ids in enumerate(prompts)
            for completion in range(count)
        )
        self.running: list[Draft] = []
        self.done: dict[tuple[int, int], Completion] = {}
        self.prefilled: Prefilled | None = None
        self.slots = min(sampler.slots, len(self.waiting))
        self.cache = self.model.new_cache(self.slots, max(map(len, prompts), default=0) + sampling.max_tokens)

    def fill(self) -> None:
        """Start waiting completions until the slots are full: draw their first tokens after their prompts."""
        while self.waiting and len(self.running) < self.slots:
            prefilled = self._prefilled()
            drafts: list[Draft] = []
            while self.waiting and len(self.running) + len(drafts) < self.slots:
                if self.waiting[0].prompt not in prefilled.rows:
                    break
                drafts.append(self.waiting.popleft())
            source = torch.tensor([prefilled.rows[draft.prompt] for draft in drafts], device=self.device)
            stay = self._draw(drafts, prefilled.logits[source])
            first, last = len(self.running), len(self.running) + len(stay)
            if stay:
                rows = torch.arange(first, last, device=self.device)
                self.cache.copy_rows(prefilled.cache, source[stay], rows, prefilled.cache.place.view)
                self.running += [drafts[index] for index in stay]

    def _prefilled(self) -> Prefilled:
        """The next waiting prompt, prefilled, with others that the free slots can start on."""
        if self.prefilled is None or self.waiting[0].prompt not in self.prefilled.rows:
            chosen = self._next_prompts(self.slots - len(self.running))
            cache, logits = self.model.prefill([self.prompts[prompt] for prompt in chosen])
            self.prefilled = Prefilled({prompt: row for row, prompt in enumerate(chosen)}, cache, logits)
        return self.prefilled

    def _next_prompts(self, free: int) -> list[int]:
        """The prompts of the next `free` waiting completions, as many as PREFILL_TOKENS allow, one at least."""
        chosen: list[int] = []
        longest = 0
        for _, draft in zip(range(free), self.waiting, strict=False):
            if chosen and draft.prompt == chosen[-1]:
                continue
            longest = max(longest, draft.prompt_length)
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(draft.prompt)
        return chosen

    def decode(self) -> None:
        """Give every running completion its next token, and free the rows of those that end with it."""
        if self.running:
            tokens = [draft.tokens[-1] for draft in self.running]
            logits = self.model.decode(self.cache, tokens, [draft.column for draft in self.running])
            self._compact(self._draw(self.running, logits))

    def _draw(self, drafts: Sequence[Draft], logits: Tensor) -> list[int]:
        """Draw each draft's next token and note those that are done; the indices of the others."""
        numbers = torch.tensor([draft.numbers[len(draft.tokens)] for draft in drafts], dtype=torch.float64)
        tokens, logprobs = draw(logits, numbers.to(self.device), self.sampling)
        stay = []
        for index, (draft, token, logprob) in enumerate(zip(drafts, tokens.tolist(), logprobs.tolist(), strict=True)):
            draft.tokens.append(token)
            draft.logprobs.append(logprob)
            if self.on_token:
                self.on_token(draft.prompt, draft.completion, token)
            if ends(draft.tokens, self.sampler.stop_token_ids, self.sampling.stop, self.sampler.tokenizer):
                self.done[draft.prompt, draft.completion] = Completion(draft.tokens, draft.logprobs, "stop")
            elif len(draft.tokens) == self.sampling.max_tokens:
                self.done[draft.prompt, draft.completion] = Completion(draft.tokens, draft.logprobs, "length")
            else:
                stay.append(index)
        return stay

    def _compact(self, stay: list[int]) -> None:
        """Keep the running completions `stay` (ascending) in rows 0, 1, …: the last move to where others ended."""
        left = len(stay)
        holes = sorted(set(range(left)) - set(stay))
        movers = [row for row in stay if row >= left]
        if holes:
            rows = torch.tensor([movers, holes], device=self.device)
            self.cache.copy_rows(self.cache, rows[0], rows[1], self.cache.place.view)
        for hole, mover in zip(holes, movers, strict=True):
            self.running[hole] = self.running[mover]
        del self.running[left:]
