"""Prompts with K answers each that are given, not sampled, as tensors, and how they are cut into parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taurl.functional.log_ratios import length_desensitized_logprobs, sequence_logprobs
from taurl.llm.scoring.budget import Size, fitting
from taurl.llm.scoring.likelihood import completion_logprobs


@dataclass(frozen=True)
class AnswerBatch:
    """N prompts with K answers each: 2 for pairs, the chosen one first.

    Attributes:
        prompts: N lists of token ids.
        tokens: int64 [N, K, L], answers padded on the right.
        mask: bool [N, K, L], the tokens of the answers.
    """

    prompts: list[list[int]]
    tokens: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]], device: torch.device
    ) -> "AnswerBatch":
        """Pad the token ids of N prompts with K answers each."""
        shape = len(answers), len(answers[0]), max(1, *(len(answer) for row in answers for answer in row))
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for n, row in enumerate(answers):
            for k, answer in enumerate(row):
                tokens[n, k, : len(answer)] = torch.tensor(answer, dtype=torch.long)
                mask[n, k, : len(answer)] = True
        return cls(list(prompts), tokens.to(device), mask.to(device))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def count(self) -> int:
        """K."""
        return self.tokens.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, int64 [N, K]."""
        return self.mask.sum(2)

    @property
    def token_count(self) -> int:
        """Tokens of all answers, and of each prompt once."""
        return sum(map(len, self.prompts)) + int(self.mask.sum())

    def only(self, place: int) -> "AnswerBatch":
        """The same prompts with one of their answers each."""
        return AnswerBatch(self.prompts, self.tokens[:, place : place + 1], self.mask[:, place : place + 1])

    def parts(self, tokens_per_part: int, *, share_prompts: bool = True) -> Iterator["AnswerPart"]:
        """Cut into parts of at most `tokens_per_part` tokens, padding and prompts included (one row at least).

        The answers of a row stay together, and rows of similar length stand together. Where prompts are not shared
        (gradient checkpointing), each answer brings a copy of its own.
        """
        count = self.count
        copies = 1 if share_prompts else count
        longest: list[int] = self.lengths.amax(1).clamp(min=1).tolist()  # an empty answer has a column, too
        rows = sorted(range(len(self)), key=lambda row: (longest[row], len(self.prompts[row])))
        for run in fitting(
            rows, lambda row: Size(count, longest[row], copies, len(self.prompts[row])), tokens_per_part
        ):
            yield self._part(run, longest[run[-1]])

    def _part(self, rows: Sequence[int], length: int) -> "AnswerPart":
        places = torch.tensor(rows, device=self.tokens.device)
        return AnswerPart(
            rows=places,
            prompts=[self.prompts[row] for row in rows],
            tokens=self.tokens[places, :, :length],
            mask=self.mask[places, :, :length],
        )


@dataclass(frozen=True)
class AnswerPart:
    """Some rows of a batch that go through the model together; `tokens` and `mask` are [n, K, l]."""

    rows: Tensor
    prompts: list[list[int]]
    tokens: Tensor
    mask: Tensor


def part_logprobs(model: Any, part: AnswerPart, *, excess_weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each whole answer and of its tokens, each prompt forwarded once, and the entropies.

    Args:
        excess_weight: what tokens count that an answer has more than the shortest of its row (LD-DPO's α).
    Returns: log-probabilities of answers [n, K] and of tokens [n, K, l], with gradient; entropies [n, K, l].
    """
    n, count, length = part.tokens.shape
    tokens, mask = part.tokens.reshape(n * count, length), part.mask.reshape(n * count, length)
    prompt_of = torch.arange(n, device=tokens.device).repeat_interleave(count)
    logprobs, entropies = completion_logprobs(model, part.prompts, prompt_of, tokens, mask)
    if excess_weight == 1:
        sums = sequence_logprobs(logprobs, mask)
    else:
        shortest = part.mask.sum(2).amin(1).repeat_interleave(count)
        sums = length_desensitized_logprobs(logprobs, mask, shortest, alpha=excess_weight)
    return sums.view(n, count), logprobs.view(n, count, length), entropies.view(n, count, length)


@torch.no_grad()
def batch_logprobs(
    model: Any, batch: AnswerBatch, tokens_per_part: int, *, share_prompts: bool = True, excess_weight: float = 1.0
) -> Tensor:
    """Log-probabilities [N, K] of a whole batch, without gradient, part by part."""
    found: dict[int, Tensor] = {}
    for part in batch.parts(tokens_per_part, share_prompts=share_prompts):
        sums, _, _ = part_logprobs(model, part, excess_weight=excess_weight)
        found |= dict(zip(part.rows.tolist(), sums, strict=True))
    return torch.stack([found[row] for row in range(len(batch))])
