"""In which order token rows are trained on: held in memory or streamed, of one data set or of several mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from taurl.llm.data.data_files import Row
from taurl.llm.data.datasets import PromptOrder, iterate_rows, key
from taurl.llm.data.row_reader import RowReader
from taurl.llm.data.tasks import named
from taurl.llm.data.token_rows import TokenRow, TokenRows
from taurl.runtime.errors import InputError

BLOCK = 1024  # draws made at once
MIXTURE, WINDOW = 1, 2  # what a random number is for, next to the seed


class Mixture:
    """Which of several data sets each row is drawn from, by their weights; follows from (seed, position) alone."""

    def __init__(self, weights: Sequence[float], seed: int):
        self.shares = np.asarray(weights, dtype=float) / sum(weights)
        self.seed = seed
        self._before = [np.zeros(len(weights), dtype=np.int64)]  # draws of each data set before each block
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def at(self, position: int) -> tuple[int, int]:
        """The data set that the draw at `position` takes from, and how many draws took from it before."""
        if len(self.shares) == 1:
            return 0, position
        block, offset = divmod(position, BLOCK)
        while len(self._before) <= block:
            counts = np.bincount(self._draws(len(self._before) - 1), minlength=len(self.shares))
            self._before.append(self._before[-1] + counts)
        draws = self._draws(block)
        source = int(draws[offset])
        return source, int(self._before[block][source] + (draws[:offset] == source).sum())

    def _draws(self, block: int) -> np.ndarray:
        if block != self._block[0]:
            generator = np.random.default_rng([self.seed, MIXTURE, block])
            self._block = block, generator.choice(len(self.shares), size=BLOCK, p=self.shares)
        return self._block[1]


class RowCycle:
    """An endless stream of token rows in memory. Each data set is gone through in reshuffled epochs of its own."""

    def __init__(self, rows: TokenRows, seed: int):
        sources = [source for source, parts in zip(rows.sources, rows.parts, strict=True) for _ in parts]
        self.rows = rows.token_rows
        self.places = [[i for i, s in enumerate(sources) if s == source] for source in range(len(rows.weights))]
        self.orders = [PromptOrder(len(places), seed + source) for source, places in enumerate(self.places)]
        self.mixture = Mixture(rows.weights, seed)
        self.position = 0

    def take(self, count: int) -> list[TokenRow]:
        """The next rows."""
        self.position += count
        return [self._at(position) for position in range(self.position - count, self.position)]

    def _at(self, position: int) -> TokenRow:
        source, nth = self.mixture.at(position)
        (place,) = self.orders[source].take(nth, 1)
        return self.rows[self.places[source][place]]

    def state_dict(self) -> dict[str, Any]:
        """The position, from which the rest follows."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.position = state["position"]


class RowStream:
    """An endless stream of token rows that are read as they are needed, and shuffled within windows.

    A window is `shuffle_window` rows of a data set. At most one of each data set is in memory. A run that resumes reads
    its window again, having passed over what was before it, and goes on within it.

    Args:
        reader: of the data set; its setting `mix` names those mixed in.
        without: questions (`datasets.key`) that are held out; rows with them are passed over.
    Raises: InputError, here and in `take`, for rows that cannot be read, and for a data set that gives none.
    """

    def __init__(self, reader: RowReader, source: object, seed: int, *, without: Collection[str] = ()):
        self.counts: Counter[str] = Counter(truncated=0, split=0, dropped=0)
        self.mixture = Mixture(reader.weights, seed)
        self.position = 0
        self.sources = [
            _Source(own, name, (seed, WINDOW, index), frozenset(without), self.counts)
            for index, (own, name) in enumerate(reader.sources(source))
        ]
        for opened in self.sources:  # what comes later is read in mid-run
            opened.reader.model_is_fixed = True

    def take(self, count: int) -> list[TokenRow]:
        """The next rows."""
        taken = []
        for _ in range(count):
            taken.append(self.sources[self.mixture.at(self.position)[0]].next())
            self.position += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Positions, and the counts so far."""
        return {
            "position": self.position,
            "sources": [source.place for source in self.sources],
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with the same data and settings."""
        self.position = state["position"]
        for source, place in zip(self.sources, state["sources"], strict=True):
            source.go_to(*place)
        self.counts.clear()  # reading the windows again has counted their rows again
        self.counts.update(state["counts"])


class _Source:
    """One data set of a stream. Its place: epoch, rows before the window, token rows taken from the window."""

    def __init__(
        self, reader: RowReader, name: object, seed: Sequence[int], without: Collection[str], counts: Counter[str]
    ):
        self.reader, self.name, self.seed, self.without, self.counts = reader, name, seed, without, counts
        self.window: list[TokenRow] = []
        self.go_to(0, 0, 0)

    @property
    def place(self) -> tuple[int, int, int]:
        return self.epoch, self.start, self.offset

    def go_to(self, epoch: int, start: int, offset: int) -> None:
        self.epoch, self.start, self.offset = epoch, start, offset
        self.found_any = start > 0
        self._rows = self._open(start)
        self._fill()

    def _open(self, start: int) -> Iterator[Row]:
        return iterate_rows(self.name, arguments=self.reader.settings.dataset_args, start=start)

    def next(self) -> TokenRow:
        while self.offset >= len(self.window):
            self.offset = 0
            if self.read:
                self.start += self.read
            else:  # the end
                if not self.found_any:
                    raise InputError(f"{self.name}: the stream gives no row to train on")
                self.epoch, self.start, self.found_any = self.epoch + 1, 0, False
                self._rows = self._open(0)
            self._fill()
        self.offset += 1
        return self.window[self.offset - 1]

    def _fill(self) -> None:
        """Read the window that begins at `start`, in the order that its seed gives it."""
        with named(self.name):
            raw = list(islice(self._rows, self.reader.settings.shuffle_window))
            rows = self.reader.prepare(raw, first=self.start + 1) if raw else []
            parts = [
                part
                for number, row in enumerate(rows, start=self.start + 1)
                if not self.without or key(row) not in self.without
                for part in self.reader.encode(row, number, self.counts)
            ]
        self.read = len(raw)
        self.found_any = self.found_any or bool(parts)
        order = np.random.default_rng([*self.seed, self.epoch, self.start]).permutation(len(parts))
        self.window = [parts[place] for place in order]
