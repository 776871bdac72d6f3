"""Decode steps recorded as CUDA graphs: the thousand kernels of a step are launched at once, and not one by one.

A graph repeats what it recorded, with the same shapes and in the same memory. So a step is recorded for numbers of rows
and columns that are rounded up. What fills up the rows are some earlier token and column, on rows of the cache that are
free: nothing reads what comes of them, and whoever gets such a row writes over its columns from 0 on.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taurl.llm.generation.cache import SlotCache
from taurl.llm.generation.slot_model import SlotModel
from taurl.llm.models.heads import causal_lm
from taurl.runtime.errors import InputError

RECORD_AT = 3  # a step of some shape is recorded when it is asked for so many times: recording costs two steps
FEWEST_COLUMNS = 128  # then twice as many, and so on: few shapes, and at most twice the columns that are needed
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as configs name their number
MOVING_ROPE = ("dynamic", "longrope")  # these look at the positions to choose their frequencies


class DecodeGraphs:
    """The decode steps of one call of `generate`, over one cache, recorded as they repeat.

    Args:
        model: on a GPU, in `SlotModel.sampling` as long as this is used.
        cache: whose rows beyond the running ones are free.
    """

    def __init__(self, model: SlotModel, cache: SlotCache):
        self.model, self.cache = model, cache
        slots, device = cache.place.slots, model.model.device
        self.tokens, self.columns = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(2))
        self.asked: Counter[tuple[int, int]] = Counter()
        self.recorded: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self.pool: Any = None  # of the memory that all graphs share: of their results only the newest is read

    def decode(self, tokens: Tensor, columns: Tensor, seen: int) -> Tensor:
        """See `SlotModel.decode`. The logits stand until the next step."""
        place, count = self.cache.place, len(tokens)
        rows = min(power_of_two(count), place.slots)
        view = min(max(power_of_two(seen), FEWEST_COLUMNS), place.capacity)
        self.tokens[:count], self.columns[:count] = tokens, columns
        shape = rows, view
        self.asked[shape] += 1
        if self.asked[shape] < RECORD_AT:
            return self._step(*shape)[:count]
        if shape not in self.recorded:
            self.recorded[shape] = self._record(lambda: self._step(*shape))
        replay, logits = self.recorded[shape]
        place.view = view
        replay()
        return logits[:count]

    def _step(self, rows: int, view: int) -> Tensor:
        return self.model.decode(self.cache, self.tokens[:rows], self.columns[:rows], view)

    def _record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What repeats a step, and where its result then stands."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # what libraries set up at their first call on a stream is not to be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result


def require_recordable(model: SlotModel) -> None:
    """Raise an InputError unless a step runs the same kernels whatever its numbers are, on a GPU."""
    config, name = model.config, type(causal_lm(model.model)).__name__
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {ropes.get("rope_type"), *(rope.get("rope_type") for rope in ropes.values() if isinstance(rope, dict))}
    if model.model.device.type != "cuda":
        found = f"the model is on {model.model.device}, not on a GPU"
    elif any(getattr(config, number, None) for number in EXPERTS):
        found = f"{name} has experts, which its tokens choose"
    elif moving := kinds & set(MOVING_ROPE):
        found = f"{name} has rotary factors of kind {moving.pop()}, which its positions choose"
    elif getattr(model.model, "is_quantized", False):
        found = f"{name} has quantised weights"
    else:
        return
    raise InputError(f"decode steps cannot be recorded as CUDA graphs: {found}; use the generator 'slots'")


def power_of_two(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << (number - 1).bit_length()
