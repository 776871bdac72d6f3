"""The data of a supervised run: training rows in order, held-out rows, and where the order stands."""

import json
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from taurl.llm.data.datasets import key
from taurl.llm.data.row_order import RowCycle, RowStream
from taurl.llm.data.row_reader import RowReader
from taurl.llm.data.tasks import held_out_count, train_and_held_out
from taurl.llm.data.token_rows import TokenRows
from taurl.runtime.errors import InputError


@dataclass
class RowData:
    """Rows to train on and rows to evaluate on, which share no question.

    Attributes:
        order: gives the training rows, endlessly.
        held_out: to evaluate on.
        count: rows drawn until the data set was gone through once, those of data sets mixed in among them; None for a
            stream.
        fingerprint: of what has been read.
        counts: training rows `truncated`, `split` or `dropped` for their length; a stream has its own. (A dropped row
            could have been held out as well, or come after the first `train_rows`.)
        notes: what a person should know of the reading.
    """

    order: RowCycle | RowStream
    held_out: TokenRows
    count: int | None
    fingerprint: str
    counts: dict[str, int]
    notes: list[str]

    @classmethod
    def read(cls, reader: RowReader, dataset: object, eval_dataset: object, settings: Any) -> Self:
        """Read what is trained and evaluated on; a stream only as far as its first window.

        Raises: InputError for what cannot be read.
        """
        if reader.settings.streaming:
            return cls._stream(reader, dataset, eval_dataset, settings)
        rows, held_out, dropped = train_and_held_out(reader, dataset, eval_dataset, settings.eval_rows, settings.seed)
        if settings.train_rows is not None:
            rows = rows.of(rows.rows[: settings.train_rows])
        for index, (_, source) in enumerate(reader.sources(dataset)):
            if index not in rows.sources:
                name = source if isinstance(source, str) else "the data"
                raise InputError(
                    f"{name}: no row of it is left to train on; what is not held out is too long, or shares its "
                    "question with a row that is"
                )
        notes = [
            f"{count} rows {what} to fit into {reader.longest} tokens" for what, count in rows.counts.items() if count
        ]
        if dropped:
            notes.append(f"{dropped} training rows left out: their questions are among the held-out ones")
        order = RowCycle(rows, settings.seed)
        count = round(len(order.places[0]) * sum(rows.weights) / rows.weights[0])
        return cls(order, held_out, count, rows.fingerprint() + held_out.fingerprint(), rows.counts, notes)

    @classmethod
    def _stream(cls, reader: RowReader, dataset: object, eval_dataset: object, settings: Any) -> Self:
        wanted = held_out_count(settings.eval_rows)
        if wanted and eval_dataset is None:
            raise InputError("a stream is not read ahead to hold rows out: give eval_dataset, or eval_rows 0")
        held_out = TokenRows([], [], [])
        if wanted:
            held_out = reader.for_other(eval_dataset).read(eval_dataset, limit=wanted, distinct=True)
        without = {key(row) for row in held_out.rows}
        order = RowStream(reader, dataset, settings.seed, without=without)
        return cls(order, held_out, None, held_out.fingerprint(), {}, [])

    def figures(self) -> dict[str, float]:
        """Passes over the data so far, and how many rows their length has changed, where it has any."""
        counts = self.counts if isinstance(self.order, RowCycle) else self.order.counts
        figures: dict[str, float] = {f"rows/{what}": count for what, count in counts.items() if count}
        if self.count is not None:
            figures["epoch"] = self.order.position / self.count
        return figures


class RowPosition:
    """Where the order of the rows stood after the last whole step, as a checkpoint holds it.

    Rows that were taken for a step that failed are taken again, so they do not count as a change of the state.
    """

    changes = 0

    def __init__(self, order: RowCycle | RowStream):
        self.order = order
        self.mark()

    def mark(self) -> None:
        """Note that the step was whole for which rows were taken last."""
        self.state: dict[str, Any] = self.order.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        """The position as the bytes of a JSON text."""
        return {"json": torch.tensor(list(json.dumps(self.state).encode()), dtype=torch.uint8)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.order.load_state_dict(json.loads(bytes(tensors["json"].tolist())))
        self.mark()
