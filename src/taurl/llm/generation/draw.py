"""Drawing tokens from logits by inverse transform, each draw keyed by where it stands."""

import math

import numpy as np
import torch
from torch import Tensor

from taurl.llm.generation.protocol import Sampling
from taurl.runtime.errors import RunError

ROWS_AT_ONCE = 32  # on a CPU: a draw holds some four times its logits in float32, and is as fast in parts


def uniforms(key: tuple[int, int], prompt: int, completion: int, length: int) -> np.ndarray:
    """The uniform numbers in [0, 1) that one completion's draws use, float64 [length].

    Philox is a counter-based generator: (seed, step) is its key, (prompt, completion) stands in its counter, so every
    completion has a stream of its own whatever is sampled beside it. Source: Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3".
    """
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, completion, prompt])
    return np.random.Generator(generator).random(length)


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the distribution it was drawn from.

    Inverse transform sampling: the first token whose cumulative probability exceeds the uniform number. One pass over
    the vocabulary, where `torch.multinomial` is some twenty times slower on a CPU.

    Args:
        logits: [R, V], any floating dtype; the softmax is in float32, or float64 for float64 logits.
        numbers: float64 [R], uniform in [0, 1).
    Returns: tokens int64 [R], logprobs float [R] (0 at temperature 0, where the draw is certain). Where a row has
        logits that are NaN or +∞, its log-probability is NaN: see `require_finite`, which reads from the device.
    """
    if len(logits) > ROWS_AT_ONCE and not logits.is_cuda:
        parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(logits), ROWS_AT_ONCE)]
        drawn = [draw(logits[part], numbers[part], sampling) for part in parts]
        return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])
    softmax_dtype = torch.promote_types(logits.dtype, torch.float32)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)  # NaN counts as the largest
        best = logits.gather(-1, tokens)[:, 0].to(softmax_dtype)
        return tokens[:, 0], best - best  # 0, and NaN for what is not finite
    scores = logits.to(softmax_dtype)
    scores = scores - scores.amax(-1, keepdim=True)
    if sampling.temperature != 1:
        # After the subtraction: even a tiny temperature, which float32 may not tell from 0, overflows to −∞ only.
        scores /= max(sampling.temperature, torch.finfo(scores.dtype).tiny)
    scores = truncate(scores, sampling)
    # A sum in parallel need not grow monotonically; in float64 that is too little to ever draw what was truncated.
    cumulative = scores.exp().cumsum(-1, dtype=torch.float64 if scores.is_cuda else None)
    total = cumulative[:, -1:]
    # Rounding may lift the target to the total itself, where no token would exceed it.
    target = (numbers[:, None].to(total) * total).minimum(total.nextafter(torch.zeros_like(total)))
    # Where the target is NaN the search may end anywhere, past the vocabulary too.
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=scores.shape[-1] - 1)
    return tokens[:, 0], (scores.gather(-1, tokens) - total.log())[:, 0]


def require_finite(logprobs: Tensor) -> None:
    """Raise a RunError if the model computed something that could not be drawn from.

    Args:
        logprobs: float [R, …], as drawn for R sequences.
    """
    if not logprobs.isfinite().all():
        count = int((~logprobs.isfinite().reshape(len(logprobs), -1).all(1)).sum())
        raise RunError(
            f"the model's logits are not finite in {count} of {len(logprobs)} sequences: its weights have diverged or "
            "are damaged, or overflow in this precision (float32 rules that out)"
        )


def truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores [R, V] with −∞ where top-k, top-p or min-p drop the token; the most likely token always stays.

    Applied in that order, each to what the one before left, as `transformers` does. Tokens that tie for the last place
    of top-k are all kept; of those that tie for the last of top-p, the first in the vocabulary.
    """
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True, stable=True)
        cumulative = ordered.softmax(-1).cumsum(-1)
        before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))  # probability of all that are more likely
        dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        scores = scores.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0:
        floor = scores.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores
