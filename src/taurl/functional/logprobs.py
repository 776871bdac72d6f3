"""Log-probability and entropy of chosen tokens from hidden states, without the full logits.

The textbook writes log_softmax(hidden · weightᵀ)[tokens], and autograd keeps [N, V] several times over: 1 GB for
2,000 tokens and SmolLM2's vocabulary in float32 alone. Here a few hundred rows of logits exist at a time, and the
backward pass computes them again, but for a bounded number that it finds kept: no memory that grows with N · V.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32

# Memory of one chunk's logits; two or three tensors of that size live at once. For a vocabulary of 49,152: 341 rows.
# Each chunk reads the whole weight and writes its whole gradient: at 256 rows the products of both passes cost 5% more
# per row than at 512, at 128 rows 15 to 25%, at 64 rows 35 to 40% (d = 576, one core, float32 and bfloat16).
CHUNK_BYTES = 64 * 2**20

# Logits kept from the forward for the backward pass, which computes those of other rows again, a quarter of the work.
# For a vocabulary of 49,152: 1,364 rows, a tenth of the memory that SmolLM2's layers keep for as many tokens.
KEPT_BYTES = 256 * 2**20

# A chunk is sized for a CPU's caches. A GPU's hold none, and each chunk reads and writes the weight's whole gradient in
# float32: there a chunk, and what is kept (a tenth of what the layers keep for these rows), are so many times as large.
GPU_FACTOR = 8

# exp(−1000) is 0 in float64 too: at and below it p · log p is 0, and log p, which may be −∞, may stand for any such.
LEAST_LOG_PROBABILITY = -1000.0


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    rows_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token, and entropy of the distribution it was chosen from.

        u = hidden · weightᵀ + bias
        z = u / temperature,   or  c · tanh(u / c) / temperature  with a softcap c (Gemma 2)
        logprob = z_token − log Σ_v exp z_v,   entropy = −Σ_v p_v log p_v,   p = softmax z

    Both outputs carry a gradient to hidden, weight and bias, computed only where it is needed:

        ∂logprob/∂z_v = [v = token] − p_v,   ∂entropy/∂z_v = −p_v (log p_v + entropy)

    A bias of −∞ forbids a token: p = 0, and p · log p = 0 in value and gradient. (With a softcap it does not: tanh(−∞)
    is −1.)

    Matrix products run in the dtype of the inputs, everything between them in float32 (float64 for float64), and the
    weight's gradient adds up over the chunks in that dtype. Neither pass makes a tensor larger than a chunk of
    logits, the inputs or their gradients; KEPT_BYTES of chunks live until the backward pass. The gradient itself cannot
    be differentiated again.

    Args:
        hidden: float [N, d], final hidden states, those that predict `tokens`. N may be 0.
        weight: float [V, d], the output embedding, of the same dtype.
        tokens: int64 [N], in [0, V).
        bias: float [V], of the same dtype; −∞ for a token that is forbidden, not for all.
        temperature: > 0.
        softcap: > 0.
        rows_per_chunk: rows of logits held at a time; by default what CHUNK_BYTES holds, on a GPU eight times that. The
            result does not depend on it beyond rounding.
    Returns: logprobs, entropy, both [N]; float32, or float64 for float64.
    Raises: ValueError if shapes or dtypes do not fit or a number is not positive; torch's own error for a token
        outside the vocabulary; RuntimeError from a backward pass with `create_graph`.
    Source: soft-capping: Gemma Team 2024, arXiv:2408.00118, section 2.
    """
    scores = score_tokens(
        hidden, weight, tokens, bias=bias, temperature=temperature, softcap=softcap, rows_per_chunk=rows_per_chunk
    )
    return scores.logprobs, scores.entropies


class TokenScores(NamedTuple):
    """What `score_tokens` finds at each chosen token, all [N]; all but `is_largest` carry a gradient.

    Attributes:
        logprobs: of the chosen token.
        entropies: of the distribution it was chosen from.
        log_normalizers: log Σ_v exp z_v.
        mean_logprobs: mean of log p over the vocabulary; −∞ where a token is forbidden.
        is_largest: bool, whether no token has a larger probability.
    """

    logprobs: Tensor
    entropies: Tensor
    log_normalizers: Tensor
    mean_logprobs: Tensor
    is_largest: Tensor


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    rows_per_chunk: int | None = None,
) -> TokenScores:
    """What supervised losses need of each chosen token, beside what `chosen_logprobs` gives, in the same two passes.

        log_normalizer = log Σ_v exp z_v,   mean_logprob = 1/V · Σ_v z_v − log_normalizer
        ∂log_normalizer/∂z_v = p_v,   ∂mean_logprob/∂z_v = 1/V − p_v

    Args, errors: as `chosen_logprobs`.
    Returns: `TokenScores`; float32, or float64 for float64.
    """
    _require_fitting(hidden, weight, tokens, bias)
    for name, value in {"temperature": temperature, "softcap": softcap, "rows_per_chunk": rows_per_chunk}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected a positive, finite number")
    factor = GPU_FACTOR if hidden.is_cuda else 1
    if rows_per_chunk is None:
        bytes_per_row = weight.shape[0] * (8 if hidden.dtype == torch.float64 else 4)
        rows_per_chunk = max(1, factor * CHUNK_BYTES // bytes_per_row)
    kept_bytes = factor * KEPT_BYTES if torch.is_grad_enabled() else 0
    outputs: tuple[Tensor, ...] = _ScoreTokens.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, tokens, temperature, softcap, rows_per_chunk, kept_bytes
    )
    return TokenScores(*outputs)


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        softcap: float | None,
        rows_per_chunk: int,
        kept_bytes: int,
    ) -> tuple[Tensor, ...]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        normalizers, entropy, means = (torch.empty_like(logprobs) for _ in range(3))
        is_largest = torch.empty_like(logprobs, dtype=torch.bool)
        kept: list[Tensor] = []  # logits of the first chunks
        for rows in _chunks(len(hidden), rows_per_chunk):
            logits = _logits(hidden[rows], weight, bias, temperature, softcap)
            largest = logits.amax(1, keepdim=True)
            logits.sub_(largest)
            chosen = logits.gather(1, tokens[rows, None])[:, 0]
            is_largest[rows] = chosen == 0
            exponentials = logits.exp()
            total = exponentials.sum(1)
            log_total = total.log()
            logprobs[rows] = chosen - log_total
            means[rows] = logits.mean(1) - log_total
            if bias is not None and softcap is None:  # nothing else makes a logit −∞, and a cap makes it finite
                logits.clamp_(min=LEAST_LOG_PROBABILITY)
            entropy[rows] = log_total - torch.linalg.vecdot(exponentials, logits) / total
            normalizers[rows] = log_total + largest[:, 0]
            if (len(kept) + 1) * rows_per_chunk * logits[0].nbytes <= kept_bytes:
                kept.append(logits.add_(largest))
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizers, entropy, *kept)
        ctx.mark_non_differentiable(is_largest)
        ctx.temperature, ctx.softcap, ctx.rows_per_chunk = temperature, softcap, rows_per_chunk
        ctx.set_materialize_grads(False)  # an output without a gradient costs nothing in backward
        return logprobs, entropy, normalizers, means, is_largest

    @staticmethod
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_normalizers: Tensor | None,
        grad_means: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: where the incoming gradients are constants, as in any Fisher or Hessian product, it
        # would give a constant, and the product would come out wrong without a word.
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of chosen_logprobs cannot be differentiated again: create_graph is set")
        incoming = (grad_logprobs, grad_entropy, grad_normalizers, grad_means)
        if all(gradient is None for gradient in incoming):
            return (None,) * 8
        hidden, weight, bias, tokens, normalizers, entropy, *kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight and not len(hidden) else None
        grad_bias = torch.zeros_like(bias, dtype=normalizers.dtype) if wants_bias else None
        for number, rows in enumerate(_chunks(len(hidden), ctx.rows_per_chunk)):
            grad_exact = _logits_gradient(
                kept[number].clone()  # the backward pass may come again
                if number < len(kept)
                else _logits(hidden[rows], weight, bias, ctx.temperature, ctx.softcap),
                tokens[rows],
                normalizers[rows],
                entropy[rows],
                [None if gradient is None else gradient[rows] / ctx.temperature for gradient in incoming],
                None if ctx.softcap is None else ctx.softcap / ctx.temperature,
            )
            if grad_bias is not None:
                grad_bias += grad_exact.sum(0)
            grad_logits = grad_exact.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if wants_weight:
                grad_weight = _with_product(grad_weight, grad_logits.T, hidden[rows], normalizers.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """z of one chunk, in the softmax's dtype; nobody else holds it, so that callers write over it."""
    logits = at_least_float32(torch.nn.functional.linear(hidden, weight, bias))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1 else logits.div_(temperature)


def _logits_gradient(
    logits: Tensor,
    tokens: Tensor,
    normalizers: Tensor,
    entropy: Tensor,
    incoming: Sequence[Tensor | None],
    bound: float | None,
) -> Tensor:
    """Gradient to u of one chunk, written over its logits z.

    The incoming gradients (to logprobs, entropy, normalizers, means) are already divided by the temperature; `bound` is
    what the soft-capped |z| stays below.
    """
    grad_logprobs, grad_entropy, grad_normalizers, grad_means = incoming
    slope = None if bound is None else (logits / bound).square_().neg_().add_(1)  # d tanh = 1 − tanh²
    log_probabilities = logits.sub_(normalizers[:, None])
    # g_l · (onehot − p) − g_e · p · (log p + H) + g_z · p + g_m · (1/V − p)
    #     =  g_l · onehot + g_m / V + p · (−g_l − g_m + g_z − g_e · H − g_e · log p)
    constant = torch.zeros_like(normalizers)
    for sign, term in ((-1, grad_logprobs), (-1, grad_means), (1, grad_normalizers)):
        if term is not None:
            constant.add_(term, alpha=sign)
    if grad_entropy is None:
        gradient = log_probabilities.exp_().mul_(constant[:, None])
    else:
        log_probabilities.clamp_(min=LEAST_LOG_PROBABILITY)
        constant -= grad_entropy * entropy
        factor = torch.addcmul(constant[:, None], log_probabilities, -grad_entropy[:, None])
        gradient = log_probabilities.exp_().mul_(factor)
    if grad_means is not None:
        gradient.add_(grad_means[:, None] / gradient.shape[1])
    if grad_logprobs is not None:
        gradient.scatter_add_(1, tokens[:, None], grad_logprobs[:, None])
    return gradient if slope is None else gradient.mul_(slope)


def _with_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A running sum of products, kept in `dtype` from the second on: one alone is not rounded again."""
    if total is None:
        return left @ right
    if right.dtype == dtype:
        return total.addmm_(left, right)
    return total.to(dtype).add_(left @ right)  # half precision: rounded once per chunk, added in float32


def _require_fitting(hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None) -> None:
    vectors = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    if len({tensor.dtype for tensor in vectors}) > 1 or not hidden.is_floating_point():
        found = ", ".join(str(tensor.dtype) for tensor in vectors)
        raise ValueError(f"hidden, weight and bias have dtypes {found}, expected one floating dtype")
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and tokens.shape == hidden.shape[:1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (hidden, weight, tokens, bias)]
        raise ValueError(
            "hidden {}, weight {}, tokens {}, bias {}: expected [N, d], [V, d], [N] and [V]".format(*shapes)
        )
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens are {tokens.dtype}, expected torch.int64")
