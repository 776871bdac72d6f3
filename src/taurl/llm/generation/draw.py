"""Drawing tokens from logits by inverse transform, each draw keyed by where it stands."""

import numpy as np
import torch
from torch import Tensor

from taurl.llm.generation.protocol import Sampling


def uniforms(key: tuple[int, int], prompt: int, completion: int, length: int) -> np.ndarray:
    """The uniform numbers in [0, 1) that one completion's draws use, float64 [length].

    Philox is a counter-based generator: (seed, step) is its key, (prompt, completion) stands in its counter, so every
    completion has a stream of its own whatever is sampled beside it. Source: Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3".
    """
    seed, step = key
    generator = np.random.Philox(key=np.array([seed, step], np.uint64), counter=[0, 0, completion, prompt])
    return np.random.Generator(generator).random(length)


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the distribution it was drawn from.

    Inverse transform sampling: the first token whose cumulative probability exceeds the uniform number. One pass over
    the vocabulary, where `torch.multinomial` is some twenty times slower on a CPU.

    Args:
        logits: [R, V], any floating dtype; the softmax is in float32, or float64 for float64 logits.
        numbers: float64 [R], uniform in [0, 1).
    Returns: tokens int64 [R], logprobs float [R] (0 at temperature 0, where the draw is certain).
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros(len(tokens), device=logits.device)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    scores = truncate(scores, sampling)
    scores -= scores.max(-1, keepdim=True).values
    cumulative = scores.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may lift the target to the total itself, where no token would exceed it.
    target = (numbers[:, None].to(total) * total).minimum(total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True)
    return tokens[:, 0], (scores.gather(-1, tokens) - total.log())[:, 0]


def truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores [R, V] with −inf where top-k, top-p or min-p drop the token; the most likely token always stays.

    Applied in that order, as `transformers` does; ties at the edge of top-k are all kept.
    """
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the tokens more likely than this one; 0 for the first
        dropped = before >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    if sampling.min_p > 0:
        floor = scores.max(-1, keepdim=True).values + np.log(sampling.min_p)
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores
