"""Two computations of one number, held against each other; a row of the table."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SAME, FLOAT32 = 1e-9, 2e-6
Loss = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    name: str
    value: float
    gradient: float | None  # None: it has none
    expected: str  # "same", "float32" or "differs"
    why: str
    judged: tuple[float, float] | None = None  # distance of taurl and of the peer from the third computation

    @property
    def verdict(self) -> str:
        largest = max(self.value, self.gradient or 0.0)
        return "same" if largest < SAME else "float32" if largest < FLOAT32 else "differs"


def distance(ours: Tensor, theirs: Tensor) -> float:
    """‖a − b‖ over the larger of the norms; infinite where either is not finite."""
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    scale = max(ours.norm(), theirs.norm())
    return float((ours - theirs).norm() / scale) if scale else 0.0


def with_gradient(loss: Loss, leaf: Tensor) -> tuple[Tensor, Tensor]:
    leaf = leaf.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True)
    return value.detach().double(), gradient.double()


def compare(
    name: str,
    cases: Sequence[tuple[Loss, Loss]],
    leaf: Tensor,
    *,
    expected: str = "same",
    why: str = "",
    judge: Loss | None = None,
) -> Row:
    """The worst of several cases (ours, theirs) on one input; the judge is of the first."""
    values, gradients = [], []
    for ours, theirs in cases:
        (value, gradient), (their_value, their_gradient) = with_gradient(ours, leaf), with_gradient(theirs, leaf)
        values.append(distance(value, their_value))
        gradients.append(distance(gradient, their_gradient))
    judged = None
    if judge is not None:
        third = with_gradient(judge, leaf)
        outcomes = [with_gradient(loss, leaf) for loss in cases[0]]
        judged = tuple(max(map(distance, outcome, third)) for outcome in outcomes)
    return Row(name, max(values), max(gradients), expected, why, judged)


def compare_values(
    name: str, ours: Tensor, theirs: Tensor, *, expected: str = "same", why: str = "", judge: Tensor | None = None
) -> Row:
    judged = None if judge is None else (distance(ours, judge), distance(theirs, judge))
    return Row(name, distance(ours, theirs), None, expected, why, judged)
