"""Rows of token ids for supervised training, and which of their tokens are targets."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from taurl.llm.data.datasets import Rows

Overlong: TypeAlias = Literal["truncate", "drop", "split"]


@dataclass(frozen=True, init=False)
class TokenRow:
    """One row as the model sees it, in five bytes a token: a data set of them is in memory whole.

    Args:
        ids: token ids, special tokens included.
        trained: for each token, whether it is a target, predicted from those before it; never the first one.
    """

    _ids: array[int]
    _trained: bytes

    def __init__(self, ids: Sequence[int], trained: Sequence[bool]):
        object.__setattr__(self, "_ids", array("i", ids))
        object.__setattr__(self, "_trained", bytes(trained))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> list[int]:
        return self._ids.tolist()

    @property
    def trained(self) -> list[bool]:
        return list(map(bool, self._trained))

    @property
    def last_target(self) -> int:
        """The place of the last target; 0 if there is none."""
        return max(0, self._trained.rfind(1))

    @property
    def targets(self) -> int:
        """How many there are."""
        return self._trained.count(1)

    @property
    def content(self) -> bytes:
        """All of it, for a hash."""
        return len(self).to_bytes(8, "little") + self._ids.tobytes() + self._trained


def fit(row: TokenRow, longest: int | None, overlong: Overlong) -> list[TokenRow]:
    """A row of at most `longest` tokens: itself, its beginning, nothing, or rows that it is cut into.

    Each of these begins with the last token of the one before, so that no target is lost. Those without a target are
    left out.
    """
    length = len(row)
    if longest is None or length <= longest:
        return [row]
    ids, trained = row.ids, row.trained
    starts = {"truncate": range(1), "drop": range(0), "split": range(0, length - 1, longest - 1)}[overlong]
    parts = [TokenRow(ids[start : start + longest], [False, *trained[start + 1 : start + longest]]) for start in starts]
    return [part for part in parts if part.targets]


@dataclass(frozen=True)
class TokenRows:
    """Rows of one or several data sets with their token ids.

    Attributes:
        rows: as they were read, less those of which nothing was left.
        parts: the token rows of each, one unless it was split.
        sources: which data set each came from, an index of `weights`.
        weights: how often rows of each data set are drawn, in proportion.
        cuts: of each row, how many of its token rows were `truncated`, `split` or `dropped` for their length.
        left_out: the same of the rows that were read and of which nothing was left.
        lasts: the token row with each row's last answer, before it was cut to length.
    """

    rows: Rows
    parts: list[list[TokenRow]]
    sources: list[int]
    weights: tuple[float, ...] = (1.0,)
    cuts: list[Counter[str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    lasts: list[TokenRow] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many were `truncated`, `split` or `dropped` for their length."""
        total = sum(self.cuts, self.left_out)
        return {what: total[what] for what in ("truncated", "split", "dropped")}

    @cached_property
    def token_rows(self) -> list[TokenRow]:
        """All token rows, in order."""
        return [row for parts in self.parts for row in parts]

    def __len__(self) -> int:
        return len(self.token_rows)

    def of(self, rows: Rows) -> TokenRows:
        """Some of the rows, which are found by identity."""
        place = {id(row): index for index, row in enumerate(self.rows)}
        kept = [place[id(row)] for row in rows]
        return TokenRows(
            rows,
            [self.parts[i] for i in kept],
            [self.sources[i] for i in kept],
            self.weights,
            [self.cuts[i] for i in kept],
            self.left_out,
            [self.lasts[i] for i in kept],
        )

    def fingerprint(self) -> str:
        """A hash of the token rows and their weights: other data, another order, template or mask give another."""
        found = hashlib.sha256(json.dumps([self.sources, self.weights]).encode())
        for row in self.token_rows:
            found.update(row.content)
        return found.hexdigest()
