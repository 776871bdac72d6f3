"""Sampled groups as tensors, and how they are cut into minibatches and parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taurl.llm.generation import Completion
from taurl.llm.scoring.budget import Size, fitting


@dataclass
class Rollout:
    """P prompts with G completions each; row p · G + g is completion g of prompt p.

    Attributes:
        prompts: P lists of token ids.
        completions: N = P · G of them.
        tokens: int64 [N, L], padded on the right.
        mask: bool [N, L], the tokens that are trained on: those that the policy chose.
        last: int64 [N], where each completion's last token is that the policy chose.
        sampler_logprobs: float [N, L], as sampled.
        advantages: float [N], or [N, L] where tokens have their own.
        old_logprobs: float [N, L], what current log-probabilities are compared with; None until a step's updates begin.
        reference_logprobs: float [N, L]; None without a KL term.
    """

    prompts: list[list[int]]
    completions: list[Completion]
    tokens: Tensor
    mask: Tensor
    last: Tensor
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
            mask[row, :length] = True if completion.chosen is None else torch.tensor(completion.chosen)
            logprobs[row, :length] = torch.tensor(completion.logprobs)
        last = (mask * torch.arange(shape[1])).amax(1)
        advantages = torch.zeros(len(completions))
        return cls(list(prompts), completions, *(t.to(device) for t in (tokens, mask, last, logprobs, advantages)))

    @property
    def group_size(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def truncated(self) -> Tensor:
        """Bool [N], what was cut off."""
        return torch.tensor([completion.truncated for completion in self.completions], device=self.mask.device)

    @property
    def lengths(self) -> Tensor:
        """Int64 [N], how many tokens each completion has, those that the policy did not choose included."""
        return torch.tensor([len(completion.tokens) for completion in self.completions], device=self.tokens.device)

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

    def parts(
        self, rows: Sequence[int], tokens_per_part: int, *, share_prompts: bool = True, whole: bool = False
    ) -> Iterator["Part"]:
        """Cut rows into parts of at most `tokens_per_part` tokens, padding and prompts included (one row at least).

        Groups of similar length stand together, and a group is split only where it does not fit in one part. A row
        without a token to train on is in no part. Where prompts are not shared (gradient checkpointing), each row
        brings a copy of its own. A completion reaches up to its last token that is trained on; a `whole` one to its
        end.
        """
        lengths = self._lengths(whole)
        groups: dict[int, list[int]] = {}
        for row in rows:
            if lengths[row]:
                groups.setdefault(row // self.group_size if share_prompts else row, []).append(row)

        def prompt_length(members: list[int]) -> int:
            return len(self.prompts[members[0] // self.group_size])

        def length(members: list[int]) -> int:
            return max(lengths[row] for row in members)

        pieces = [
            piece
            for members in sorted(groups.values(), key=length)
            for piece in fitting(members, lambda row: Size(1, lengths[row]), tokens_per_part - prompt_length(members))
        ]
        for run in fitting(pieces, lambda it: Size(len(it), length(it), 1, prompt_length(it)), tokens_per_part):
            yield self._part([row for piece in run for row in piece], max(map(length, run)))

    def _lengths(self, whole: bool) -> list[int]:
        """Each completion's length, whole or up to the last token that is trained on; 0 where there is none."""
        columns = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        trained = (self.mask * columns).amax(1)
        lengths: list[int] = (torch.where(trained > 0, self.lengths, 0) if whole else trained).tolist()
        return lengths

    def _part(self, rows: Sequence[int], length: int) -> "Part":
        groups = sorted({row // self.group_size for row in rows})
        place = {group: position for position, group in enumerate(groups)}
        device = self.tokens.device
        return Part(
            prompts=[self.prompts[group] for group in groups],
            prompt_of=torch.tensor([place[row // self.group_size] for row in rows], device=device),
            rows=torch.tensor(rows, device=device),
            length=length,
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

    def put(self, values: Tensor, *, into: Tensor) -> None:
        """Write values [n, length] of these rows into a rollout's tensor [N, L]."""
        into[self.rows, : self.length] = values.to(into.dtype)
