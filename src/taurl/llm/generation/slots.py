"""The slot sampler: continuous batching over the trainer's own weights.

A fixed number of slots decode together. What all prompts begin with goes through the model once, where that pays; then
each prompt does, beside others of its length, and is forked, by copying its keys and values, to the slots of its
completions and of those of equal prompts; when a sequence ends, its slot goes to the next one waiting, so that no batch
waits for its longest member. On a CPU completions that have drawn the same tokens so far go through the model as one,
and are forked where they part.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taurl.llm.beginnings import worth_a_pass
from taurl.llm.generation.cache import SlotCache
from taurl.llm.generation.draw import draw, require_finite, uniforms
from taurl.llm.generation.graphs import DecodeGraphs, require_recordable
from taurl.llm.generation.protocol import Completion, Sampling, check_prompts, ends
from taurl.llm.generation.slot_model import SlotModel
from taurl.runtime.errors import InputError
from taurl.runtime.machine import free_memory_gb

PREFILL_TOKENS = 4096  # prompt tokens, padding included, that go through the model together
PREFILL_PADDED = 1.5  # at most so many times their tokens without padding
# Tokens that every sequence gets before the first look at them. Looking makes a GPU wait for the processor and back;
# what a sequence gets after its end is thrown away. On a CPU there is nothing to wait for.
TOKENS_A_LOOK = {"cpu": 1}
TOKENS_A_LOOK_ELSEWHERE = 8


class SlotSampler:
    """Samples from a causal language model of `transformers`, in evaluation mode.

    Args:
        model: any model whose layers are full or sliding-window attention.
        stop_token_ids: tokens that end a completion.
        tokenizer: needed for stop strings only.
        slots: sequences that decode together, at most.
        kv_memory_gb: GB that their keys and values may take: fewer decode together where more would not fit. (Prompts
            on their way to a slot take room for PREFILL_TOKENS tokens more, or for a quarter more.) None: see
            `default_kv_memory_gb`.
        cuda_graphs: record decode steps and repeat the record; see `DecodeGraphs`.
    Raises: InputError for a model with other layers, and for one whose steps cannot be recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Iterable[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        slots: int = 64,
        kv_memory_gb: float | None = None,
        cuda_graphs: bool = False,
    ):
        if slots < 1:
            raise InputError(f"slots is {slots}, expected at least 1")
        if kv_memory_gb is None:
            kv_memory_gb = default_kv_memory_gb(model.device)
        self.kv_memory_gb = kv_memory_gb
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.stop_token_ids = frozenset(stop_token_ids)
        self.slot_model = SlotModel(model)
        if cuda_graphs:
            require_recordable(self.slot_model)
        self.records = cuda_graphs
        self.tokens_a_look = TOKENS_A_LOOK.get(model.device.type, TOKENS_A_LOOK_ELSEWHERE)

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
        """See `Generator.generate`. For one number of slots the result is the same bit for bit, else up to rounding.

        Raises: InputError if not even one sequence fits in `kv_memory_gb`.
        """
        check_prompts(prompts, sampling, self.model)
        batch = Batch(self, prompts, count, sampling, key, on_token)
        with self.slot_model.sampling():
            while batch.waiting or batch.running:
                batch.fill()
                batch.decode()
                if progress:
                    progress(len(batch.done), len(prompts) * count)
        return [[batch.done[prompt, completion] for completion in range(count)] for prompt in range(len(prompts))]

    def release(self) -> None:
        """See `Generator.release`."""
        self.slot_model.packed.release()

    def slots_for(self, tokens: int) -> int:
        """How many sequences of up to `tokens` tokens, prompt included, decode together."""
        gb = self.slot_model.bytes_of(tokens) / 1e9
        if gb > self.kv_memory_gb:
            raise InputError(
                f"one sequence of {tokens} tokens (the longest prompt and max_tokens) needs {gb:.3g} GB for keys and "
                f"values, kv_memory_gb is {self.kv_memory_gb:.3g}: raise it, or lower max_tokens or the prompt's length"
            )
        return min(self.slots, int(self.kv_memory_gb / gb))


@dataclass
class Draft:
    """A completion in the making, and the uniform numbers of its draws."""

    prompt: int
    completion: int
    prompt_ids: tuple[int, ...]
    numbers: np.ndarray
    row: int = -1  # where its keys and values stand: of the prefilled prompts, then of the batch's cache
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def column(self) -> int:
        """Where the newest token's key and value go: the token was drawn, but has not been through the model."""
        return len(self.prompt_ids) + len(self.tokens) - 1


@dataclass
class Prefilled:
    """Prompts that have been through the model: the row of each, their keys and values, the logits that follow."""

    rows: dict[tuple[int, ...], int]
    cache: SlotCache
    logits: Tensor


class Batch:
    """One call of `generate`: which completions wait, which run (in the order of their rows), which are done.

    Rows 0, 1, …, `rows` − 1 of the cache are in use. Drafts that share one have the same prompt and tokens.
    """

    def __init__(
        self,
        sampler: SlotSampler,
        prompts: Sequence[Sequence[int]],
        count: int,
        sampling: Sampling,
        key: tuple[int, int],
        on_token: Callable[[int, int, int], None] | None,
    ):
        self.sampler, self.sampling, self.on_token = sampler, sampling, on_token
        self.model, self.device = sampler.slot_model, sampler.model.device
        # Prompts of similar length stand together, and equal ones next to each other. What is drawn follows from the
        # place of a prompt among those given, so the order here changes no result.
        order = sorted(range(len(prompts)), key=lambda prompt: (len(prompts[prompt]), tuple(prompts[prompt])))
        self.waiting = deque(
            Draft(prompt, completion, ids, uniforms(key, prompt, completion, sampling.max_tokens))
            for prompt in order
            for ids in [tuple(prompts[prompt])]
            for completion in range(count)
        )
        self.running: list[Draft] = []
        self.rows = 0
        self.shares = sampler.tokens_a_look == 1  # else they part without being looked at
        self.done: dict[tuple[int, int], Completion] = {}
        self.begins = worth_a_pass(list({draft.prompt_ids for draft in self.waiting}), self.device)
        self.beginning: SlotCache | None = None
        self.prefilled: Prefilled | None = None
        self.longest = max(map(len, prompts), default=0) + sampling.max_tokens
        self.slots = min(sampler.slots_for(self.longest), len(self.waiting))
        self.cache = self.model.new_cache(self.slots, self.longest)
        graphs = DecodeGraphs(self.model, self.cache) if sampler.records else None
        self.step = graphs.decode if graphs else partial(self.model.decode, self.cache)

    def fill(self) -> None:
        """Start waiting completions until the slots are full: draw their first tokens after their prompts."""
        while self.waiting and len(self.running) < self.slots:
            prefilled = self._prefilled()
            drafts: list[Draft] = []
            while self.waiting and len(self.running) + len(drafts) < self.slots:
                if self.waiting[0].prompt_ids not in prefilled.rows:
                    break
                drafts.append(self.waiting.popleft())
                drafts[-1].row = prefilled.rows[drafts[-1].prompt_ids]
            drawn = self._draw(drafts, self._of_each(drafts, prefilled.logits), self._numbers(drafts, 1)[0], 0)
            branches = self._branches(self._take(drafts, [drawn]))
            self._fork(branches, list(range(self.rows, self.rows + len(branches))), prefilled.cache)
            self.running += [draft for branch in branches for draft in branch]
            self.rows += len(branches)
        if not self.waiting:
            self.prefilled = self.beginning = None  # their memory is free for the decoding that is left

    def _prefilled(self) -> Prefilled:
        """The next waiting prompt, prefilled, with others that wait after it."""
        if self.prefilled is None or self.waiting[0].prompt_ids not in self.prefilled.rows:
            chosen = self._next_prompts()
            self.prefilled = None  # its memory is wanted for the next
            if self.begins and self.beginning is None:
                self.beginning, _ = self.model.prefill([chosen[0][: self.begins]])
            cache, logits = self.model.prefill(chosen, self.beginning)
            self.prefilled = Prefilled({ids: row for row, ids in enumerate(chosen)}, cache, logits)
        return self.prefilled

    def _next_prompts(self) -> list[tuple[int, ...]]:
        """The distinct prompts of the next waiting completions, one at least, also of those that no slot is free for.

        As many as fill the slots, and as PREFILL_TOKENS and PREFILL_PADDED and the memory for their keys and values
        allow. They come in order of length: the newest is the longest.
        """
        chosen: list[tuple[int, ...]] = []
        tokens, room = 0, max(PREFILL_TOKENS, self.slots * self.longest // 4)
        for draft in self.waiting:
            ids = draft.prompt_ids
            if chosen and ids == chosen[-1]:
                continue
            length = len(ids) - self.begins
            tokens += length
            rows = len(chosen) + 1
            if chosen and (rows * length > min(PREFILL_TOKENS, PREFILL_PADDED * tokens) or rows * len(ids) > room):
                break
            chosen.append(ids)
            if rows == self.slots:
                break
        return chosen

    def decode(self) -> None:
        """Give every running completion its next token or tokens, and free the rows of those that end with one."""
        running = self.running
        if not running:
            return
        of_rows = list({draft.row: draft for draft in running}.values())
        left = min(self.sampling.max_tokens - len(draft.tokens) for draft in running)
        steps = min(self.sampler.tokens_a_look, left)
        numbers = self._numbers(running, steps)
        tokens = torch.tensor([draft.tokens[-1] for draft in of_rows], device=self.device)
        columns = torch.tensor([draft.column for draft in of_rows], device=self.device)
        seen = max(draft.column for draft in running) + 1
        drawn = []
        for step in range(steps):
            logits = self.step(tokens, columns + step, seen + step)
            drawn.append(self._draw(running, self._of_each(running, logits), numbers[step], step))
            tokens = drawn[-1][0]  # read where there is another step, and no row is shared
        self._settle(self._take(running, drawn))

    def _numbers(self, drafts: Sequence[Draft], steps: int) -> Tensor:
        """The uniform numbers of each draft's next draws, float64 [steps, R]."""
        rows = [draft.numbers[len(draft.tokens) : len(draft.tokens) + steps] for draft in drafts]
        return torch.from_numpy(np.stack(rows, 1)).to(self.device)

    def _of_each(self, drafts: Sequence[Draft], logits: Tensor) -> Tensor:
        """The logits that follow each draft's row."""
        rows = [draft.row for draft in drafts]
        return logits if rows == list(range(len(logits))) else logits[torch.tensor(rows, device=self.device)]

    def _draw(self, drafts: Sequence[Draft], logits: Tensor, numbers: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """A token and its log-probability for each row of logits, one a draft.

        `drafts` and `ahead` tell the tests which draw it is: of the token at `len(draft.tokens) + ahead`.
        """
        return draw(logits, numbers, self.sampling)

    def _take(self, drafts: Sequence[Draft], drawn: Sequence[tuple[Tensor, Tensor]]) -> list[Draft]:
        """Add what was drawn to each draft, up to its end; note those that are done, and give the others."""
        tokens, logprobs = (torch.stack(of_steps, 1).cpu() for of_steps in zip(*drawn, strict=True))
        require_finite(logprobs)
        left = []
        for draft, *drawn_of in zip(drafts, tokens.tolist(), logprobs.tolist(), strict=True):
            completion = self._finished(draft, *drawn_of)
            if completion is None:
                left.append(draft)
            else:
                self.done[draft.prompt, draft.completion] = completion
        return left

    def _finished(self, draft: Draft, tokens: list[int], logprobs: list[float]) -> Completion | None:
        """Add tokens to a draft; the completion, if it ends with one of them."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            draft.tokens.append(token)
            draft.logprobs.append(logprob)
            if self.on_token:
                self.on_token(draft.prompt, draft.completion, token)
            if ends(draft.tokens, self.sampler.stop_token_ids, self.sampling.stop, self.sampler.tokenizer):
                return Completion(draft.tokens, draft.logprobs, "stop")
            if len(draft.tokens) == self.sampling.max_tokens:
                return Completion(draft.tokens, draft.logprobs, "length")
        return None

    def _branches(self, drafts: Sequence[Draft]) -> list[list[Draft]]:
        """Drafts that may share a row from now on: those that did and have drawn the same token."""
        if not self.shares:
            return [[draft] for draft in drafts]
        branches: dict[tuple[int, int], list[Draft]] = {}
        for draft in drafts:
            branches.setdefault((draft.row, draft.tokens[-1]), []).append(draft)
        return list(branches.values())

    def _fork(self, branches: Sequence[list[Draft]], rows: Sequence[int], source: SlotCache) -> None:
        """Copy what stands in each branch's row of the source to a row of its own."""
        if branches:
            copied = torch.tensor([[branch[0].row for branch in branches], rows], device=self.device)
            self.cache.copy_rows(source, copied[0], copied[1], source.place.view)
        for branch, row in zip(branches, rows, strict=True):
            for draft in branch:
                draft.row = row

    def _settle(self, drafts: list[Draft]) -> None:
        """Keep these in rows 0, 1, …: one branch of a row stays there, others move to where all have ended or left.

        No row is both read and written: a row that is written has no draft, or lies beyond those in use before.
        """
        branches = self._branches(drafts)
        self.rows = len(branches)
        staying: dict[int, list[Draft]] = {}
        for branch in branches:
            if branch[0].row < self.rows:
                staying.setdefault(branch[0].row, branch)
        movers = [branch for branch in branches if staying.get(branch[0].row) is not branch]
        self._fork(movers, [row for row in range(self.rows) if row not in staying], self.cache)
        self.running = sorted(drafts, key=lambda draft: draft.row)


def default_kv_memory_gb(device: torch.device) -> float:
    """A quarter of the memory that is free by now: with the model loaded, and training still to take its part."""
    return free_memory_gb(device) / 4
