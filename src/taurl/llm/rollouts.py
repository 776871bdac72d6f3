"""Sampled groups as tensors, and how they are cut into minibatches and parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taurl.llm.generation import Completion


@dataclass
class Rollout:
    """P prompts with G completions each; row p · G + g is completion g of prompt p.

    Attributes:
        prompts: P lists of token ids.
        completions: N = P · G of them.
        tokens: int64 [N, L], padded on the right.
        mask: bool [N, L], the tokens that are trained on.
        sampler_logprobs: float [N, L], as sampled.
        advantages: float [N].
        old_logprobs: float [N, L], the trainer's before the first update; None while there is only one update.
        reference_logprobs: float [N, L]; None without a KL term.
    """

    prompts: list[list[int]]
    completions: list[Completion]
    tokens: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None

    @classmethod
    def of(
        cls, prompts: Sequence[list[int]], groups: Sequence[Sequence[Completion]], device: torch.device
    ) -> "Rollout":
        """Pad what the generator gave; advantages are 0 until they are set."""
        completions = [completion for group in groups for completion in group]
        shape = len(completions), max(len(completion.tokens) for completion in completions)
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        logprobs = torch.zeros(shape)
        for row, completion in enumerate(completions):
            length = len(completion.tokens)
            tokens[row, :length] = torch.tensor(completion.tokens)
            mask[row, :length] = True
            logprobs[row, :length] = torch.tensor(completion.logprobs)
        advantages = torch.zeros(len(completions))
        return cls(list(prompts), completions, *(t.to(device) for t in (tokens, mask, logprobs, advantages)))

    @property
    def group_size(self) -> int:
        return len(self.completions) // len(self.prompts)

    def minibatches(self, count: int, key: Sequence[int]) -> list[list[int]]:
        """Rows of each minibatch: whole groups, in an order drawn from `key` where there is more than one."""
        groups = np.arange(len(self.prompts))
        if count > 1:
            groups = np.random.default_rng(list(key)).permutation(groups)
        size = self.group_size
        return [
            [int(group) * size + member for group in chosen for member in range(size)]
            for chosen in np.array_split(groups, count)
        ]

    def parts(self, rows: Sequence[int], tokens_per_part: int) -> Iterator["Part"]:
        """Cut rows into parts of at most `tokens_per_part` tokens, padding and prompts included (one row at least).

        Groups of similar length stand together, and a group is split only where it does not fit in one part.
        """
        last = self.mask.shape[1] - self.mask.flip(1).long().argmax(1)  # up to the last token that is trained on
        lengths: list[int] = torch.where(self.mask.any(1), last, 0).tolist()
        by_group: dict[int, list[int]] = {}
        for row in rows:
            if lengths[row]:
                by_group.setdefault(row // self.group_size, []).append(row)
        ordered = sorted(by_group.values(), key=lambda members: max(lengths[row] for row in members))
        chosen: list[int] = []
        for members in ordered:
            if chosen and self._cost([*chosen, *members], lengths) > tokens_per_part:
                yield self._part(chosen, lengths)
                chosen = []
            for row in members:
                if chosen and self._cost([*chosen, row], lengths) > tokens_per_part:
                    yield self._part(chosen, lengths)
                    chosen = []
                chosen.append(row)
        if chosen:
            yield self._part(chosen, lengths)

    def _cost(self, rows: Sequence[int], lengths: Sequence[int]) -> int:
        prompts = [self.prompts[group] for group in {row // self.group_size for row in rows}]
        return len(prompts) * max(map(len, prompts)) + len(rows) * max(lengths[row] for row in rows)

    def _part(self, rows: Sequence[int], lengths: Sequence[int]) -> "Part":
        groups = sorted({row // self.group_size for row in rows})
        place = {group: position for position, group in enumerate(groups)}
        device = self.tokens.device
        return Part(
            prompts=[self.prompts[group] for group in groups],
            prompt_of=torch.tensor([place[row // self.group_size] for row in rows]).to(device),
            rows=torch.tensor(rows).to(device),
            length=max(lengths[row] for row in rows),
        )


@dataclass(frozen=True)
class Part:
    """Some rows of a rollout that go through the model together: `prompt_of` says which of `prompts` each continues."""

    prompts: list[list[int]]
    prompt_of: Tensor
    rows: Tensor
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a rollout's tensor [N, L] or [N], cut to their longest completion."""
        picked = tensor[self.rows]
        return picked[:, : self.length] if tensor.dim() == 2 else picked
