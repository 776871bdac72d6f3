"""Attention of bfloat16 on a CPU: torch's kernel forwards, and backwards a few products of whole rows.

The kernel's own backward pass hands small products of every row and head to oneDNN, one by one, which costs more than
their arithmetic. Here the weights are computed again from the logarithm of their sum, which the forward pass keeps, and
each gradient is one product for all heads of some rows. Scores, weights and their gradient are in float32, and rounded
for the products that follow, as in the kernel.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "taurl_whole_products"
SHAPE = 8, 9, 16, 64, 64  # rows, heads, queries, keys, size: short completions with their prompt
LONGEST = 512  # keys; of longer rows the kernel's products are large enough
WORTH = 1.5  # times as fast, from which on it is taken: noise should not turn the choice
SCORES_AT_ONCE = 2**20  # 4 MB in float32, about what a core's cache holds; one row at least
SEES_NOTHING = -1e20  # a log-sum below it is of a query all of whose keys are masked
LOG2_E = 1 / math.log(2)
# What a layer may pass without changing the result: the mask has the window already.
HARMLESS = {"sliding_window", "position_ids", "use_cache"}

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class WholeProducts(torch.autograd.Function):
    """softmax(scale · Q · Kᵀ + mask) · V of [R, H, Q, D] and twice [R, K, S, D], with H a multiple of K."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        attended, logsumexp = kernel(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, mask, attended, logsumexp)
        ctx.causal, ctx.scale = causal, scale
        found: Tensor = attended
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """dV = Pᵀ · dO; dS = scale · P ∘ (dO · Vᵀ − δ) with δ = Σ dO ∘ O; dQ = dS · K; dK = dSᵀ · Q.

        Source: Dao et al. 2022, arXiv:2205.14135, appendix B.2. P = 2^((S − log Σ e^S) · log₂ e), since torch's `exp`
        takes a hundred times as long where it comes to 0.
        """
        query, key, value, mask, attended, logsumexp = ctx.saved_tensors
        (rows, heads, queries, size), (key_heads, keys) = query.shape, key.shape[1:3]
        dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
        if ctx.causal:
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
            mask = torch.zeros(1, 1, queries, keys, dtype=wide).masked_fill(hidden, -torch.inf)
        mask = torch.zeros(1, 1, 1, 1, dtype=wide) if mask is None else mask
        masks = mask.expand(rows, 1, queries, keys)[:, :, None]
        offsets = logsumexp.to(wide).contiguous() * LOG2_E
        offsets = offsets.masked_fill_(offsets < SEES_NOTHING, torch.inf).view(rows, key_heads, -1, queries, 1)
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        of_query, of_key, of_value = gradients
        step = max(1, SCORES_AT_ONCE // (heads * queries * keys))
        for part in (slice(start, start + step) for start in range(0, rows, step)):
            # Heads that share keys, one below the other: [rows × key heads, queries of all of them, …].
            q, o, do = (each[part].reshape(-1, heads // key_heads * queries, size) for each in (query, attended, slope))
            k, v = (each[part].reshape(-1, keys, size) for each in (key, value))
            weights = (masks[part].to(wide) * LOG2_E - offsets[part]).reshape(len(q), -1, keys)
            weights.baddbmm_(q.to(wide) * (ctx.scale * LOG2_E), k.to(wide).mT).exp2_()
            scaled = do.to(wide) * ctx.scale
            slopes = torch.bmm(scaled, v.to(wide).mT)
            slopes.sub_((scaled * o).sum(-1, keepdim=True)).mul_(weights)
            weights, slopes = weights.to(dtype), slopes.to(dtype)
            of_value[part] = torch.bmm(weights.mT, do).view_as(of_value[part])
            of_key[part] = torch.bmm(slopes.mT, q).view_as(of_key[part])
            of_query[part] = torch.bmm(slopes, k).view_as(of_query[part])
        return *gradients, None, None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
) -> Tensor:
    """`scaled_dot_product_attention` with that backward pass, where there is one and the rows are short.

    Args:
        query: [R, H, Q, D]; key, value: [R, K, S, D], with K a divisor of H.
        mask: bool or as the query, [R or 1, 1, Q, S]; or None.
    """
    given = query, key, value
    differs = torch.is_grad_enabled() and any(each.requires_grad for each in given)
    # What torch looks at before it calls its kernel.
    fits = query.device.type == "cpu" and all(
        each.stride(-1) == 1 and each.shape[-1] == query.shape[-1] for each in given
    )
    fits = fits and key.shape == value.shape and len(key) == len(query) and query.shape[1] % key.shape[1] == 0
    fits = fits and not (mask is not None and mask.requires_grad)
    if not differs or not fits or query.shape[2] == 1 or not 0 < key.shape[2] <= LONGEST:
        return plain(query, key, value, mask, causal=causal, scale=scale)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    found: Tensor = WholeProducts.apply(
        query, key, value, mask, causal, query.shape[-1] ** -0.5 if scale is None else scale
    )  # type: ignore[no-untyped-call]
    return found


def plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
) -> Tensor:
    """`scaled_dot_product_attention` of heads that may share keys; arguments as those of `attend`."""
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


def attend_by_whole_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """`transformers`' sdpa by `attend`, where it knows all that is asked; arguments and result are those of that."""
    changes = dropout or any(value is not None for name, value in rest.items() if name not in HARMLESS)
    by_head = attention_mask is not None and attention_mask.shape[1] != 1
    if changes or by_head or query.shape[2] == 1 or query.device.type != "cpu":
        alone: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest
        )
        return alone
    causal = attention_mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    attended = attend(query, key, value, attention_mask, causal=causal, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend_by_whole_products)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Choice:
    """How the models attend that this process loads, once it is known: what is faster, or what a run began with."""

    whole_products: bool | None = None


def choose(whole_products: bool | None = None) -> bool:
    """Choose for all models in bfloat16 on this CPU that are loaded from now on; None measures which is faster."""
    Choice.whole_products = whole_products_pay() if whole_products is None else whole_products
    return Choice.whole_products


def attending_as_chosen(model: PreTrainedModel) -> PreTrainedModel:
    """The model; the layers of one in bfloat16 on a CPU that attend by sdpa do so by whole products, if chosen."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return model
    if choose(Choice.whole_products):
        for config in (model.config, model.config.get_text_config()):
            if config._attn_implementation == "sdpa":
                config._attn_implementation = NAME
    return model


@functools.cache
def whole_products_pay() -> bool:
    """Whether attention of bfloat16 is faster on this CPU by whole products: measured once a process."""
    return seconds(scaled_dot_product_attention) > WORTH * seconds(
        lambda *given: attend(*given, causal=False, scale=None)
    )


def seconds(attention: Callable[..., Tensor]) -> float:
    """Best time of three for attention in bfloat16, forward and backward, after a first one."""
    rows, heads, queries, keys, size = SHAPE
    shapes = (rows, heads, queries, size), (rows, heads, keys, size), (rows, heads, keys, size)
    given = [torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    times = []
    with torch.enable_grad():
        for _ in range(4):
            start = time.perf_counter()
            torch.autograd.grad(attention(*given, mask).sum(), given)
            times.append(time.perf_counter() - start)
    return min(times[1:])
