"""One reverse linear recurrence, the core of every return and advantage that looks ahead."""

import torch
from torch import Tensor

# Rows up to which a step at a time is as good as anything, and the length of a block above. The blocks of a scan run
# side by side, so that 32 steps over all of them take the place of T steps over a few numbers each.
LONGEST_PLAIN_SCAN = 64
STEPS_PER_BLOCK = 32


def reverse_scan(factors: Tensor, increments: Tensor) -> Tensor:
    """Solve x_t = b_t + a_t · x_{t+1} for all t, with x_T = 0 past the end.

    A factor of 0 cuts: nothing that follows is read there, whatever it holds, so that the episodes of a column do not
    touch. Where anything in a column comes out NaN or infinite, by a number given or by an overflow on the way that no
    x has a part in, the column is done again a step at a time.

    Args:
        factors, increments: a and b, float [T, B], one dtype. No gradient passes: call it under `torch.no_grad`.
    Returns: x, [T, B].
    """
    found = _scan(factors, increments)
    if not found.sum().isfinite():  # cheaper than to look at each, and finite only if each is
        broken = ~found.isfinite().all(0)
        found[:, broken] = _sweep_with_cuts(factors[:, broken], increments[:, broken])
    return found


def _scan(factors: Tensor, increments: Tensor) -> Tensor:
    """The recurrence in blocks; exact in each column where all that it finds is finite.

    A block of S steps takes what follows it to its own first x by an affine map, whose factor is the product of the
    block's a and whose constant is its first x if 0 followed. One sweep over all blocks at once finds these maps; what
    follows each block is the same recurrence over the blocks, solved by recursion; a second sweep then fills in every
    x in the plain loop's own arithmetic. Nothing is divided. What overflows in a map stays visible in the result: it
    makes the block's first x NaN or infinite, and with it the x before.
    """
    steps, width = increments.shape
    nothing = increments.new_zeros(width)
    if steps <= LONGEST_PLAIN_SCAN:
        return _sweep(factors, increments, nothing)
    blocks = -(-steps // STEPS_PER_BLOCK)
    a, b = _in_blocks(factors, blocks), _in_blocks(increments, blocks)
    products, firsts = torch.ones_like(a[0]), torch.zeros_like(b[0])
    for factor, increment in zip(reversed(a.unbind()), reversed(b.unbind()), strict=True):
        firsts = torch.addcmul(increment, factor, firsts)
        products.mul_(factor)
    firsts = _scan(products, firsts)
    found = _sweep(a, b, torch.cat([firsts[1:], nothing[None]]))
    return found.transpose(0, 1).flatten(0, 1)[:steps]


def _sweep(factors: Tensor, increments: Tensor, following: Tensor) -> Tensor:
    """The plain loop along the first dimension; `following` is x past its end."""
    found = torch.empty_like(increments)
    rows = zip(*(reversed(tensor.unbind()) for tensor in (factors, increments, found)), strict=True)
    for factor, increment, row in rows:
        following = torch.addcmul(increment, factor, following, out=row)
    return found


def _sweep_with_cuts(factors: Tensor, increments: Tensor) -> Tensor:
    """The plain loop, where 0 · NaN and 0 · ∞ are 0."""
    found, following = torch.empty_like(increments), torch.zeros_like(increments[0])
    cuts = factors == 0
    rows = zip(*(reversed(tensor.unbind()) for tensor in (factors, increments, cuts, found)), strict=True)
    for factor, increment, cut, row in rows:
        following = torch.addcmul(increment, factor, following.masked_fill(cut, 0.0), out=row)
    return found


def _in_blocks(tensor: Tensor, blocks: int) -> Tensor:
    """[T, B] as [S, blocks, B], each step of all blocks together in memory; zeros after the end."""
    steps, width = tensor.shape
    padding = blocks * STEPS_PER_BLOCK - steps
    if padding:
        tensor = torch.cat([tensor, tensor.new_zeros(padding, width)])
    return tensor.reshape(blocks, STEPS_PER_BLOCK, width).transpose(0, 1).contiguous()
