"""Token rows through the model: cut into parts, forwarded, and scored where a token is a target."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from taurl.functional.logprobs import TokenScores
from taurl.llm.data.token_rows import TokenRow
from taurl.llm.models.heads import body, causal_lm, output_head
from taurl.llm.scoring.budget import Size, fitting
from taurl.llm.scoring.likelihood import head_scores
from taurl.llm.scoring.row_attention import laid_end_to_end


@dataclass(frozen=True)
class RowPart:
    """n rows that go through the model together: end to end in one long row, or padded on the right.

    A row goes in up to the token before its last target: nothing after that is predicted or looked at.

    Attributes:
        rows: places of the rows in their batch.
        lengths: tokens that go in, of each row.
        starts: where each row begins, in the flattened part.
        ids: int64 [1, T] end to end, or [n, L]; 0 where padded.
        predicting: int64 [M], the places in the flattened part whose next token is a target.
        targets: int64 [M], those tokens.
        packed: whether the rows lie end to end.
    """

    rows: list[int]
    lengths: list[int]
    starts: list[int]
    ids: Tensor
    predicting: Tensor
    targets: Tensor
    packed: bool

    @classmethod
    def of(cls, batch: Sequence[TokenRow], rows: Sequence[int], device: torch.device, *, packed: bool) -> "RowPart":
        """These rows of a batch; packed: end to end."""
        lengths = [batch[row].last_target for row in rows]  # tokens that go through the model: what is before it
        longest = max(lengths)
        starts = [0, *accumulate(lengths)][:-1] if packed else [place * longest for place in range(len(rows))]
        ids = torch.zeros(sum(lengths) if packed else longest * len(rows), dtype=torch.long)
        predicting: list[int] = []
        targets: list[int] = []
        for row, start, length in zip(rows, starts, lengths, strict=True):
            tokens, trained = batch[row].ids, batch[row].trained
            ids[start : start + length] = torch.tensor(tokens[:length])
            places = [place for place in range(1, length + 1) if trained[place]]
            predicting += [start + place - 1 for place in places]
            targets += [tokens[place] for place in places]
        shaped = ids[None] if packed else ids.view(len(rows), longest)
        return cls(
            rows=list(rows),
            lengths=lengths,
            starts=starts,
            ids=shaped.to(device),
            predicting=torch.tensor(predicting, device=device),
            targets=torch.tensor(targets, device=device),
            packed=packed,
        )


def trained_tokens(batch: Sequence[TokenRow]) -> int:
    """How many targets the rows have together."""
    return sum(row.targets for row in batch)


def row_parts(
    batch: Sequence[TokenRow], tokens_per_part: int, device: torch.device, *, packed: bool
) -> Iterator[RowPart]:
    """Cut a batch into parts of at most `tokens_per_part` tokens, padding included (one row at least).

    A row without a target is in no part.
    """
    lengths = {place: length for place, row in enumerate(batch) if (length := row.last_target)}
    for rows in (packed_rows if packed else sorted_rows)(lengths, tokens_per_part):
        yield RowPart.of(batch, rows, device, packed=packed)


def packed_rows(lengths: dict[int, int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing: longest rows first, each into the part where it leaves the least room.

    Args:
        lengths: of the rows, by place.
    Returns: the places in each part.
    """
    parts: list[list[int]] = []
    room: list[int] = []
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        fitting = [part for part in range(len(parts)) if room[part] >= lengths[row]]
        if fitting:
            best = min(fitting, key=lambda part: room[part])
        else:
            best = len(parts)
            parts.append([])
            room.append(capacity)
        parts[best].append(row)
        room[best] -= lengths[row]
    return parts


def sorted_rows(lengths: dict[int, int], capacity: int) -> list[list[int]]:
    """Rows of similar length together, as many as fit when each is padded to the longest."""
    rows = sorted(lengths, key=lambda row: lengths[row])
    return list(fitting(rows, lambda row: Size(1, lengths[row]), capacity))


def part_scores(model: PreTrainedModel, part: RowPart, noise: Tensor | None = None) -> TokenScores:
    """Scores [M] of a part's targets, with gradient. Packed parts need `attending_within_rows` around it.

    Args:
        noise: float [T, d] of the flattened part, added to the input embeddings.
    """
    options = {}
    if part.packed:
        options = {"position_ids": row_positions(part), **laid_end_to_end(part.lengths, part.ids.device)}
    with nullcontext() if noise is None else adding_to_embeddings(model, noise.view(*part.ids.shape, -1)):
        # No attention mask: padding stands on the right, where no real token looks.
        output = body(model)(input_ids=part.ids, use_cache=False, **options)
    hidden = output.last_hidden_state.flatten(0, 1)[part.predicting]
    return head_scores(output_head(model), hidden, part.targets)


def row_positions(part: RowPart) -> Tensor:
    """Position of each token of a packed part in its own row, int64 [1, T]."""
    return torch.cat([torch.arange(length) for length in part.lengths])[None].to(part.ids.device)


@contextmanager
def adding_to_embeddings(model: PreTrainedModel, noise: Tensor) -> Iterator[None]:
    """Inside, what the input embedding gives (a scale that it has included) has `noise` added to it."""
    embedding = causal_lm(model).get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: output + noise.to(output))
    try:
        yield
    finally:
        handle.remove()


def embedding_noise(part: RowPart, batch: Sequence[TokenRow], width: int, alpha: float, key: tuple[int, int]) -> Tensor:
    """NEFTune's noise, U(−1, 1) · α / √(L · d) with L a row's whole length and d the width; 0 on padding.

    Its norm over a row is then about α/√3, whatever the length. It follows from the key and the row's place in its
    batch alone.

    Args:
        width: d, of the embeddings.
        key: (seed, step).
    Returns: float32 [T, d], of the flattened part.
    Source: Jain et al. 2023, arXiv:2310.05914, algorithm 1.
    """
    noise = np.zeros((part.ids.numel(), width), dtype=np.float32)
    for row, start, length in zip(part.rows, part.starts, part.lengths, strict=True):
        # Philox is a counter-based generator: (seed, step) is its key, the row stands in its counter.
        philox = np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, 0, row])
        uniform = 2 * np.random.Generator(philox).random((length, width), dtype=np.float32) - 1
        noise[start : start + length] = uniform * (alpha / (len(batch[row]) * width) ** 0.5)
    return torch.from_numpy(noise).to(part.ids.device)
