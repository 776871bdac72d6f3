"""Key-value storage by slot: a running sequence, or several that are equal so far, writes into one row in place."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):
    """`slots` rows of `capacity` columns in every layer. Columns are positions: nothing is padded on the left.

    Attributes:
        place: where the next forward pass writes, and what it sees.
    """

    def __init__(self, layers: int, slots: int, capacity: int):
        self.place = Placement(slots, capacity)
        self.slot_layers = [SlotLayer(self.place) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    def copy_rows(self, source: "SlotCache", source_rows: Tensor, rows: Tensor, columns: int) -> None:
        """Copy the first `columns` columns of the source's rows into these rows, in every layer."""
        for layer, other in zip(self.slot_layers, source.slot_layers, strict=True):
            if not other.is_initialized:  # a layer that reads the keys and values of another one
                continue
            if not layer.is_initialized:
                layer.lazy_initialization(other.keys, other.values)
            layer.keys[rows, :, :columns] = other.keys[source_rows, :, :columns]
            layer.values[rows, :, :columns] = other.values[source_rows, :, :columns]


class Placement:
    """Where a forward pass writes; shared by all layers. The pass works on rows 0, 1, … of the storage.

    Attributes:
        slots, capacity: rows and columns of the storage.
        columns: int64 [R], where each row writes its one token; None for a prefill of the first rows.
        start: the column that a prefill writes from.
        view: how many columns the pass sees.
    """

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self.columns: Tensor | None = None
        self.rows: Tensor | None = None
        self.start = self.view = 0

    def prefill_from(self, start: int, view: int) -> None:
        """Let the next pass write the columns from `start` to `view` of its rows."""
        self.start, self.view = start, view

    def decode_at(self, columns: Tensor, view: int) -> None:
        """Let the next pass write one token into each of the first R rows."""
        self.columns, self.rows = columns, torch.arange(len(columns), device=columns.device)
        self.view = view


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [slots, heads, capacity, head size], allocated at the first write."""

    is_sliding = False  # all columns are kept; a window is a matter of the mask

    keys: Tensor
    values: Tensor

    def __init__(self, place: Placement):
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, capacity = self.place.slots, self.place.capacity
        self.keys = key_states.new_zeros(slots, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states [R, heads, Q, head size]; return the rows' keys and values up to column `view`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, count = self.place, len(key_states)
        if place.columns is None:
            self.keys[:count, :, place.start : place.view] = key_states
            self.values[:count, :, place.start : place.view] = value_states
        else:
            self.keys[place.rows, :, place.columns] = key_states[:, :, 0]
            self.values[place.rows, :, place.columns] = value_states[:, :, 0]
        return self.keys[:count, :, : place.view], self.values[:count, :, : place.view]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.view, 0

    def get_seq_length(self) -> int:
        return self.place.view

    def get_max_length(self) -> int:
        return self.place.capacity
