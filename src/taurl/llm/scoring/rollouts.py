"""Sampled groups as tensors, and how they are cut into minibatches and parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taurl.llm.generation import Completion
from taurl.llm.scoring.budget import Size, fitting
from taurl.llm.scoring.likelihood import rows_of


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

        Groups of similar length stand together, and a group is split only where it does not fit in one part. Equal
        completions of a prompt stand together and count once. A row without a token to train on is in no part. Where
        prompts are not shared (gradient checkpointing), each distinct row brings a copy of its own. A completion
        reaches up to its last token that is trained on; a `whole` one to its end.
        """
        alike = self._alike(rows, whole)
        lengths = {copies[0]: len(tokens) for (_, tokens, _), copies in alike.items()}
        groups: dict[int, list[list[int]]] = {}
        for copies in alike.values():
            groups.setdefault(copies[0] // self.group_size if share_prompts else copies[0], []).append(copies)

        def prompt_length(members: list[list[int]]) -> int:
            return len(self.prompts[members[0][0] // self.group_size])

        def length(members: list[list[int]]) -> int:
            return max(lengths[copies[0]] for copies in members)

        pieces = [
            piece
            for members in groups.values()
            for piece in fitting(
                sorted(members, key=lambda it: lengths[it[0]]),
                lambda it: Size(1, lengths[it[0]], 0, prompt_length([it])),
                tokens_per_part - prompt_length(members),
            )
        ]
        pieces.sort(key=length)
        for run in fitting(pieces, lambda it: Size(len(it), length(it), 1, prompt_length(it)), tokens_per_part):
            yield self._part([copies for piece in run for copies in piece], max(map(length, run)))

    def _alike(self, rows: Sequence[int], whole: bool) -> dict[tuple[int, tuple[int, ...], bytes], list[int]]:
        """Those rows by group, tokens and mask, up to the last token that is trained on, or whole; none without one."""
        mask = self.mask.cpu().numpy()
        alike: dict[tuple[int, tuple[int, ...], bytes], list[int]] = {}
        for row in rows:
            trained = mask[row].nonzero()[0]
            if len(trained):
                tokens = self.completions[row].tokens
                length = len(tokens) if whole else int(trained[-1]) + 1
                key = row // self.group_size, tuple(tokens[:length]), mask[row, :length].tobytes()
                alike.setdefault(key, []).append(row)
        return alike

    def _part(self, distinct: Sequence[list[int]], length: int) -> "Part":
        groups = sorted({copies[0] // self.group_size for copies in distinct})
        place = {group: position for position, group in enumerate(groups)}
        rows = [row for copies in distinct for row in copies]
        copy_of = [index for index, copies in enumerate(distinct) for _ in copies]
        device = self.tokens.device
        return Part(
            prompts=[self.prompts[group] for group in groups],
            prompt_of=torch.tensor([place[copies[0] // self.group_size] for copies in distinct], device=device),
            distinct=torch.tensor([copies[0] for copies in distinct], device=device),
            rows=torch.tensor(rows, device=device),
            copy_of=torch.tensor(copy_of, device=device) if len(rows) > len(distinct) else None,
            length=length,
        )


@dataclass(frozen=True)
class Part:
    """Some rows of a rollout that go through the model together, equal ones once.

    A policy that has settled gives the same short answer many times. Copies have the same log-probabilities, entropies
    and values, and the gradient is that of their sum, so that one of them stands for all.

    Attributes:
        prompts: P lists of token ids.
        prompt_of: int64 [d], which of them each distinct row continues.
        distinct: int64 [d], where the first of each stands in the rollout.
        rows: int64 [n], where all stand there.
        copy_of: int64 [n], the distinct row that each row equals; None where no row has a copy.
        length: that of the longest.
    """

    prompts: list[list[int]]
    prompt_of: Tensor
    distinct: Tensor
    rows: Tensor
    copy_of: Tensor | None
    length: int

    def inputs(self, tensor: Tensor) -> Tensor:
        """The distinct rows of a rollout's tensor [N, L], cut to the longest: what goes through the model."""
        return tensor[self.distinct, : self.length]

    def spread(self, values: Tensor) -> Tensor:
        """What the model gave for the distinct rows [d, …], for all rows [n, …]."""
        return values if self.copy_of is None else rows_of(values, self.copy_of)

    def of(self, tensor: Tensor) -> Tensor:
        """All rows of a rollout's tensor [N, L] or [N], cut to the longest."""
        picked = tensor[self.rows]
        return picked[:, : self.length] if tensor.dim() == 2 else picked

    def put(self, values: Tensor, *, into: Tensor) -> None:
        """Write values [n, length] of these rows into a rollout's tensor [N, L]."""
        into[self.rows, : self.length] = values.to(into.dtype)
