"""Completions of a prompt as a tree: as far as they are alike, their tokens go through a model once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixTree:
    """N completions of P prompts: tokens of a prompt that stand behind the same tokens are one node.

    A model that has become sure of how to answer gives answers that part late: of "57 - 60 = -3" and "57 - 60 = -13"
    all but the end is one path. The hidden state of a node depends on the prompt and on its path alone, and the
    gradient that reaches it is the sum over the completions that pass through, as if each had been forwarded by itself.

    Only nodes with a wanted token behind them become columns: Q of them at most for a prompt, parents before children.
    What is predicted where is a *guess*, a state and the token behind it, the same for all completions that share both.

    Attributes:
        columns: P lists of token ids, the nodes.
        parents: P lists of the column before each, −1 where that is the prompt's end.
        states: where each guess is made, (prompt, column), column −1 for the prompt's end.
        guessed: the token of each guess.
        guess_of: int64 [N, L], the guess that each token is, 0 where none is wanted.
    """

    columns: list[list[int]]
    parents: list[list[int]]
    states: list[tuple[int, int]]
    guessed: list[int]
    guess_of: Tensor

    @classmethod
    def of(cls, prompt_count: int, prompt_of: Tensor, tokens: Tensor, mask: Tensor) -> "PrefixTree":
        """Merge completions [N, L] that continue the prompts `prompt_of` [N]; `mask` [N, L] are the tokens wanted."""
        columns: list[list[int]] = [[] for _ in range(prompt_count)]
        parents: list[list[int]] = [[] for _ in range(prompt_count)]
        children: dict[tuple[int, int, int], int] = {}
        guesses: dict[tuple[int, int, int], int] = {}
        guess_of = np.zeros(tuple(mask.shape), dtype=np.int64)
        wanted = mask.cpu().numpy()
        for row, (prompt, path) in enumerate(zip(prompt_of.tolist(), tokens.tolist(), strict=True)):
            places = wanted[row].nonzero()[0].tolist()
            column = -1
            for place in range(places[-1] + 1 if places else 0):
                edge = prompt, column, path[place]
                if wanted[row, place]:
                    guess_of[row, place] = guesses.setdefault(edge, len(guesses))
                if place == places[-1]:
                    break
                child = children.setdefault(edge, len(columns[prompt]))
                if child == len(columns[prompt]):
                    columns[prompt].append(path[place])
                    parents[prompt].append(column)
                column = child
        states, guessed = [edge[:2] for edge in guesses], [token for _, _, token in guesses]
        return cls(columns, parents, states, guessed, torch.from_numpy(guess_of).to(tokens.device))

    @cached_property
    def width(self) -> int:
        """Q, the most columns of a prompt."""
        return max(map(len, self.columns))

    def ids(self) -> Tensor:
        """Tokens of the columns, int64 [P, Q], padded on the right."""
        return self._padded(self.columns)

    def depths(self) -> Tensor:
        """How many tokens of its completion stand before each column, int64 [P, Q]."""
        found: list[list[int]] = []
        for parents in self.parents:
            depths: list[int] = []
            for parent in parents:
                depths.append(0 if parent < 0 else depths[parent] + 1)
            found.append(depths)
        return self._padded(found)

    def sees(self) -> Tensor:
        """Which columns each may look at, bool [P, Q, Q]: itself and those on its path. Padding sees itself."""
        found = np.zeros((len(self.columns), self.width, self.width), dtype=bool)
        found[:, range(self.width), range(self.width)] = True
        for tree, parents in zip(found, self.parents, strict=True):
            for column, parent in enumerate(parents):
                if parent >= 0:
                    tree[column] |= tree[parent]
        return torch.from_numpy(found).to(self.guess_of.device)

    def state_places(self) -> Tensor:
        """Where the state of each guess lies among the flattened [P, 1 + Q], prompts' ends first; int64 [guesses]."""
        places = [prompt * (1 + self.width) + 1 + column for prompt, column in self.states]
        return torch.tensor(places, device=self.guess_of.device)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        filled = np.zeros((len(rows), self.width), dtype=np.int64)
        for row, values in enumerate(rows):
            filled[row, : len(values)] = values
        return torch.from_numpy(filled).to(self.guess_of.device)
