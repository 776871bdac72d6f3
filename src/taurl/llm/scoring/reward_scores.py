"""Scores of completions under a model with one output: for the whole sequence, or at each step of a process.

A sequence is scored where `transformers` pools it: at its last token that is not the model's pad token. A pad token
that is the end of sequence too is therefore passed over at the end of a completion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taurl.llm.data.preference_rows import JudgedRow
from taurl.llm.models.heads import causal_lm, evaluating
from taurl.llm.models.loading import Head
from taurl.llm.scoring.budget import Size, fitting
from taurl.llm.scoring.likelihood import completion_hidden
from taurl.runtime.errors import InputError

# How far a hidden state may be from the model's own, as a share of its length. Of SmolLM2-135M in bfloat16 the two were
# 0.005 apart, and from float32 0.013; the place beside the right one differs by 0.4 and more.
TOLERANCE = 0.1


@dataclass(frozen=True)
class ScoringPart:
    """Rows that go through the model together.

    Attributes:
        rows: places of the rows in what was cut into parts.
        prompts: P lists of token ids, one a row.
        prompt_of: int64 [N], which prompt each completion continues.
        tokens: int64 [N, L + 1], completions padded on the right, and one column more.
        at_row, at_token: int64 [M], where the scores stand: after so many tokens of that completion.
        counts: how many of the M scores each row has, in their order.
    """

    rows: list[int]
    prompts: list[list[int]]
    prompt_of: Tensor
    tokens: Tensor
    at_row: Tensor
    at_token: Tensor
    counts: list[int]

    def by_row(self, scores: Tensor) -> Iterator[tuple[int, list[float]]]:
        """Each row's place, and its scores out of the part's [M]."""
        values = iter(scores.detach().tolist())
        for place, count in zip(self.rows, self.counts, strict=True):
            yield place, [next(values) for _ in range(count)]


def scoring_parts(
    rows: Sequence[JudgedRow],
    tokens_per_part: int,
    *,
    pad: int | None,
    device: torch.device | str = "cpu",
    share_prompts: bool = True,
) -> Iterator[ScoringPart]:
    """Cut rows into parts of at most `tokens_per_part` tokens, padding included (one row at least).

    Rows of similar length stand together; the completions of a row stay together and share its prompt. Where prompts
    are not shared (gradient checkpointing), each completion counts with a copy of it.

    Args:
        pad: the model's pad token; None scores at the last token whatever it is, as transformers does without one.
    """
    pooled = [row if row.step_ends else pooled_row(row, pad) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: (pooled[place].longest, place))

    def size(place: int) -> Size:
        row, count = pooled[place], len(pooled[place].completions)
        return Size(count, max(map(len, row.completions)), 1 if share_prompts else count, len(row.prompt))

    for chosen in fitting(order, size, tokens_per_part):
        yield _part(pooled, chosen, device)


def pooled_row(row: JudgedRow, pad: int | None) -> JudgedRow:
    """The row up to the tokens that its completions are scored at: what follows them, they do not see."""
    whole = [row.prompt + completion for completion in row.completions]
    ends = [max((place for place, token in enumerate(ids, start=1) if token != pad), default=1) for ids in whole]
    cut = min(len(row.prompt), *ends)  # less than the prompt where a completion holds nothing but padding
    return JudgedRow(row.prompt[:cut], [ids[cut:end] for ids, end in zip(whole, ends, strict=True)])


def _part(rows: Sequence[JudgedRow], chosen: list[int], device: torch.device | str) -> ScoringPart:
    picked = [rows[place] for place in chosen]
    completions = [(index, completion) for index, row in enumerate(picked) for completion in row.completions]
    tokens = torch.zeros(len(completions), 1 + max(len(completion) for _, completion in completions), dtype=torch.long)
    for line, (_, completion) in enumerate(completions):
        tokens[line, : len(completion)] = torch.tensor(completion, dtype=torch.long)
    at = [
        (line, place)
        for line, (index, completion) in enumerate(completions)
        for place in ([end + 1 for end in picked[index].step_ends] or [len(completion)])
    ]
    at_row, at_token = (torch.tensor(places, device=device) for places in zip(*at, strict=True))
    return ScoringPart(
        rows=chosen,
        prompts=[row.prompt for row in picked],
        prompt_of=torch.tensor([index for index, _ in completions], device=device),
        tokens=tokens.to(device),
        at_row=at_row,
        at_token=at_token,
        counts=[len(row.step_ends) or len(row.completions) for row in picked],
    )


def part_hidden(model: PreTrainedModel, part: ScoringPart) -> Tensor:
    """Hidden states [M, d] that a part is scored by."""
    return completion_hidden(model, part.prompts, part.prompt_of, part.tokens)[part.at_row, part.at_token]


def part_scores(model: PreTrainedModel, part: ScoringPart) -> Tensor:
    """Scores [M] of a part, with gradient, each prompt forwarded once."""
    return _through_head(model, part_hidden(model, part))


def _through_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Scores [M] of hidden states [M, d].

    The head computes in float32 at least: in bfloat16 scores from 4 to 8 would be multiples of 1/32, and many equal.
    """
    head, dtype = score_head(model), torch.promote_types(hidden.dtype, torch.float32)
    weights = {name: weight.to(dtype) for name, weight in head.named_parameters()}
    scores: Tensor = torch.func.functional_call(head, weights, (hidden.to(dtype),))
    return scores.squeeze(-1)


@torch.inference_mode()
def row_scores(model: PreTrainedModel, rows: Sequence[JudgedRow], tokens_per_part: int) -> list[list[float]]:
    """Scores of each row's completions (of a process: of its steps), without gradient."""
    owners, pieces = [], []
    for place, row in enumerate(rows):
        for piece in _pieces(row, tokens_per_part):
            owners.append(place)
            pieces.append(piece)
    scored: list[list[float]] = [[] for _ in pieces]
    with evaluating(model):
        for part in scoring_parts(pieces, tokens_per_part, pad=pad_token_id(model), device=causal_lm(model).device):
            for place, values in part.by_row(part_scores(model, part)):
                scored[place] = values
    found: list[list[float]] = [[] for _ in rows]
    for owner, values in zip(owners, scored, strict=True):
        found[owner] += values
    return found


def _pieces(row: JudgedRow, tokens_per_part: int) -> Iterator[JudgedRow]:
    """A row whose completions do not fit into a part with their prompt, as several; without a loss they may part."""
    longest = max(map(len, row.completions))
    count = max(1, (tokens_per_part - len(row.prompt)) // max(1, longest))
    if len(row.completions) <= count:
        yield row
        return
    for start in range(0, len(row.completions), count):
        yield JudgedRow(row.prompt, row.completions[start : start + count])


def score_head(model: PreTrainedModel) -> nn.Module:
    """The layer [d] → [1] that gives a score, with its adapter if it has one. Raises: InputError if there is none."""
    plain: Any = causal_lm(model)
    for name in ("score", "classifier"):
        if isinstance(head := getattr(plain, name, None), nn.Module):
            return head
    raise InputError(f"{type(plain).__name__} has no layer named score or classifier, so it gives no scores")


def pad_token_id(model: PreTrainedModel) -> int | None:
    """The token that the model's own pooling passes over."""
    found: int | None = causal_lm(model).config.get_text_config().pad_token_id
    return found


def head_kind(model: PreTrainedModel) -> Head:
    """Whether the model scores sequences or tokens. Raises: InputError if it does neither."""
    name = type(causal_lm(model)).__name__
    if name.endswith("ForSequenceClassification"):
        return "sequence"
    if name.endswith("ForTokenClassification"):
        return "token"
    raise InputError(f"{name} gives no scores; expected a model for sequence or token classification with one label")


@torch.inference_mode()
def check_scores(model: PreTrainedModel) -> None:
    """Compare what is scored with what the model's own pass gives its head, on two sequences, one of them padded.

    Hidden states are compared, not scores: rounding in bfloat16 may move a score as far as another place does.

    Raises: InputError where they disagree: a model that is not causal, pools otherwise, or does more in its head.
    """
    plain: Any = causal_lm(model)
    pad, kind = pad_token_id(model), head_kind(model)
    size = plain.config.get_text_config().vocab_size
    # From the middle of the vocabulary: on rows of special tokens SmolLM2 is chaotic, 0.66 off in bfloat16.
    a, b, c = [token for token in range(size // 3, size) if token != pad][:3]
    rows = [
        JudgedRow([a, b], [[c, end]], step_ends=[1] if kind == "token" else [])
        for end in (a, a if pad is None else pad)
    ]
    with evaluating(plain):
        if not all(_scores_as_known(model, row, kind) for row in rows):
            raise InputError(
                f"{type(plain).__name__} scores otherwise than taurl knows (one label, a causal model, pooled at the "
                "last token that is no padding, one linear layer): choose another model"
            )


def _scores_as_known(model: PreTrainedModel, row: JudgedRow, kind: Head) -> bool:
    """Whether the model's own score of a row of one completion is its head's, where `part_hidden` reads it."""
    plain: Any = causal_lm(model)
    part = next(scoring_parts([row], 1, pad=pad_token_id(model), device=plain.device))
    hidden, place = part_hidden(model, part), len(part.prompts[0]) + int(part.at_token) - 1
    ids = row.prompt + row.completions[0]
    passed: list[tuple[Tensor, Tensor]] = []
    watch = score_head(model).register_forward_hook(lambda _, given, found: passed.append((given[0], found)))
    try:
        logits = plain(input_ids=torch.tensor([ids], device=plain.device)).logits
    finally:
        watch.remove()
    if not passed or passed[0][1].shape != (1, len(ids), 1):
        return False  # several labels, or a head that sees one place only
    given, found = (values[:, place] for values in passed[0])
    own, score = logits.flatten()[-1 if kind == "token" else 0].float(), found.item()
    same_hidden = (hidden - given).float().norm() <= TOLERANCE * given.float().norm()
    same_head = (_through_head(model, given) - score).abs() <= TOLERANCE * max(1.0, abs(score))
    return bool(same_hidden and same_head and own == score)
