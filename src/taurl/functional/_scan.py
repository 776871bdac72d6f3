"""One reverse linear recurrence, the core of every return and advantage that looks ahead."""

import torch
from torch import Tensor

# Rows up to which a step at a time is as good as anything, and the length of a block above. The blocks of a scan run
# side by side, so that 32 steps over all of them take the place of T steps over a few numbers each.
LONGEST_PLAIN_SCAN = 64
STEPS_PER_BLOCK = 32


def reverse_scan(factors: Tensor, increments: Tensor) -> Tensor:
    """Solve x_t = b_t + a_t · x_{t+1} for all t, with x_T = 0 past the end.

    A block of S steps takes what follows it to its own first x by an affine map, whose factor is the product of the
    block's a and whose constant is its first x if 0 followed. One sweep over all blocks at once finds these maps; what
    follows each block is the same recurrence over the blocks, solved by recursion; a second sweep then fills in every
    x in the plain loop's own arithmetic. Nothing is divided. Products of factors above 1 may overflow where no x
    does: then the plain loop runs.

    Args:
        factors, increments: a and b, float [T, B], one dtype. No gradient passes: call it under `torch.no_grad`.
    Returns: x, [T, B].
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
    if not products.isfinite().all():
        return _sweep(factors, increments, nothing)
    firsts = reverse_scan(products, firsts)
    found = _sweep(a, b, torch.cat([firsts[1:], nothing[None]]))
    return found.transpose(0, 1).flatten(0, 1)[:steps]


def _sweep(factors: Tensor, increments: Tensor, following: Tensor) -> Tensor:
    """The plain loop along the first dimension; `following` is x past its end."""
    found = torch.empty_like(increments)
    rows = zip(*(reversed(tensor.unbind()) for tensor in (factors, increments, found)), strict=True)
    for factor, increment, row in rows:
        following = torch.addcmul(increment, factor, following, out=row)
    return found


def _in_blocks(tensor: Tensor, blocks: int) -> Tensor:
    """[T, B] as [S, blocks, B], each step of all blocks together in memory; zeros after the end."""
    steps, width = tensor.shape
    padding = blocks * STEPS_PER_BLOCK - steps
    if padding:
        tensor = torch.cat([tensor, tensor.new_zeros(padding, width)])
    return tensor.reshape(blocks, STEPS_PER_BLOCK, width).transpose(0, 1).contiguous()
