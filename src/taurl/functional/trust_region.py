"""The natural gradient step of TRPO: as far as the surrogate's linear model asks, no further than the KL allows.

    minimize  surrogate(θ)   subject to   KL(θ) = mean KL(π_old ‖ π_θ) ≤ δ
    surrogate ≈ surrogate(θ_old) + gᵀs,   KL ≈ ½ sᵀHs,   s = θ − θ_old,   H the Fisher matrix
    s = β x,   H x = −g,   β = √(2δ / xᵀHx),   then β shrinks until both hold for the functions themselves

Nothing here knows a module or a distribution. A policy is a list of parameters and two closures over it; the first
argument of the divergence is fixed before the step:

    old_logits = policy(observations).detach()
    trust_region_step(
        surrogate=lambda: surrogate_loss(policy(observations), actions, advantages),     # a mean; to be minimized
        kl=lambda: categorical_kl(old_logits, policy(observations)).mean(),
        parameters=list(policy.parameters()),
        max_kl=0.01,
    )

Both closures must give the same number for the same parameters: no dropout, no batch statistics. `kl` is differentiated
twice, so a kernel that has no second derivative cannot be in it.

Source: Schulman et al. 2015, arXiv:1502.05477, appendix C.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, flat, require_positive, require_same_shape


class Solution(NamedTuple):
    """What `conjugate_gradient` found: x, and ‖b − Ax‖ / ‖b‖ as its recursion has it (0 for b = 0)."""

    vector: Tensor
    residual: float


class LineSearch(NamedTuple):
    """Whether a step was taken, and which fraction of it, with the divergence and the improvement there; else zeros."""

    accepted: bool
    fraction: float
    kl: float
    improvement: float


class TrustRegionStep(NamedTuple):
    """What `trust_region_step` did: a `LineSearch`, and the residual of the linear system that gave the direction."""

    accepted: bool
    fraction: float
    kl: float
    improvement: float
    residual: float


def trust_region_step(
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    max_kl: float,
    damping: float = 0.1,
    iterations: int = 10,
    tolerance: float = 1e-5,
    shrink: float = 0.8,
    tries: int = 10,
) -> TrustRegionStep:
    """Move the parameters along the natural gradient of the surrogate, within KL ≤ δ; or leave them as they are.

    Afterwards the surrogate is lower and the divergence at most δ, or no bit of the parameters has changed: where the
    gradient is 0 or not finite, or no fraction of the step satisfies both. `grad` fields are neither read nor written.
    To take the curvature from a part of the batch, as the paper does, put the functions below together by hand.

    Where this differs from sb3-contrib's TRPO: the divergence is KL(old‖new), the paper's, there KL(new‖old), the same
    to second order only; conjugate gradient starts at 0 and not at noise, so that a step repeats exactly and a zero
    gradient moves nothing, and its tolerance is relative to ‖g‖, so that the scale of the advantages does not matter;
    10 iterations and not 15, as in the paper, which found more to be of no use. Damping and line search have its
    defaults; appendix C gives no numbers for them.

    Args:
        surrogate: the loss [], a scalar whose gradient is the policy gradient, e.g. the mean of −ratio · advantage.
        kl: the mean of KL(π_old‖π) [], with π_old held fixed at the present parameters: 0 when called now.
        parameters: leaves, changed in place; each once. One that a closure does not use has gradient 0 there.
        max_kl: δ > 0.
        damping: λ ≥ 0 of H + λ·1, which bounds the step along directions that the batch says nothing about.
        iterations, tolerance: of `conjugate_gradient`.
        shrink, tries: of `backtracking_line_search`.
    Returns: what happened, numbers only.
    Raises: ValueError if a number is outside its range, there is no parameter or a closure gives no scalar.
    Source: Schulman et al. 2015, arXiv:1502.05477, appendix C.
    """
    _require_at_least_0(damping=damping)
    loss = surrogate()
    _require_scalar("surrogate", loss)
    gradient = flat(torch.autograd.grad(loss, _nonempty(parameters), materialize_grads=True))
    fisher = fisher_vector_product(kl(), parameters)

    def curvature(vector: Tensor) -> Tensor:
        return fisher(vector) + damping * vector

    solution = conjugate_gradient(curvature, -gradient, iterations=iterations, tolerance=tolerance)
    step = maximum_step(curvature, solution.vector, max_kl=max_kl)
    search = backtracking_line_search(surrogate, kl, parameters, step, max_kl=max_kl, shrink=shrink, tries=tries)
    return TrustRegionStep(*search, residual=solution.residual)


def fisher_vector_product(kl: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """v ↦ H v, with H the Hessian of the divergence: the mean Fisher matrix E[∇log π ∇log πᵀ] where π is π_old.

        H v = ∇( ∇KL · v )     by back-propagating twice, the first time once for all v

    Args:
        kl: [], the mean of KL(π_old‖π_θ) with π_old held fixed, computed at θ = θ_old with its graph. The function
            returned keeps that graph, and is of no use once the parameters change.
        parameters: those H is about, n numbers in all.
    Returns: a function of a flat vector [n], in the order of the parameters, to [n] without gradient; float32, or
        float64 where a parameter is float64.
    Raises: ValueError if kl is not a scalar or there is no parameter; from the function, if the vector is not [n].
    Source: Schulman et al. 2015, arXiv:1502.05477, section C.1, its generic method. The one it prefers, with a Jacobian
        and the distribution's own Fisher matrix, costs somewhat less and needs code for each distribution.
    """
    _require_scalar("kl", kl)
    slopes = torch.autograd.grad(kl, _nonempty(parameters), create_graph=True, materialize_grads=True)
    gradient = flat(slopes)

    def product(vector: Tensor) -> Tensor:
        require_same_shape(vector=vector, parameters=gradient)
        slope = gradient @ vector.detach().to(gradient.dtype)
        return flat(torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True))

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int = 10, tolerance: float = 1e-5
) -> Solution:
    """Solve A x = b for a symmetric positive definite A of which only products with a vector are known.

    In exact arithmetic n iterations suffice, or as many as A has distinct eigenvalues. It stops early at the tolerance,
    and at a direction of no or of negative curvature, with what it has; b = 0, or a b that is not finite, gives x = 0.

    Args:
        product: v ↦ A v, [n] to [n]. For damping add λ v in it.
        target: b, float [n].
        iterations: at most, ≥ 1; each takes one product.
        tolerance: of ‖b − A x‖ / ‖b‖, ≥ 0.
    Returns: x [n], as `Solution.vector`, float32, or float64 for float64; and its residual, NaN for a b not finite.
    Raises: ValueError if b is not [n] or a number is outside its range.
    """
    _require_at_least_0(tolerance=tolerance)
    if iterations < 1 or target.dim() != 1:
        raise ValueError(f"iterations is {iterations}, target {list(target.shape)}: expected at least 1, and [n]")
    target = at_least_float32(target.detach())
    solution = torch.zeros_like(target)
    scale = target.abs().amax() if target.numel() else target.sum()
    if scale == 0 or not scale.isfinite():
        return Solution(solution, scale.item() * 0)
    residual = target / scale  # A is linear: the squares of small or large numbers need not leave the range of floats
    direction = residual.clone()
    initial = squares = residual @ residual
    for _ in range(iterations):
        if not squares > tolerance**2 * initial:
            break
        image = product(direction)
        curvature = direction @ image
        if not curvature > 0:
            break
        length = squares / curvature
        solution += length * direction
        residual -= length * image
        previous, squares = squares, residual @ residual
        direction = residual + squares / previous * direction
    return Solution(solution * scale, (squares / initial).sqrt().item())


def maximum_step(product: Callable[[Tensor], Tensor], direction: Tensor, *, max_kl: float) -> Tensor:
    """The step along x at whose end the quadratic model of the divergence is δ:  √(2δ / xᵀHx) · x.

    With damping in the product, as in sb3-contrib, the undamped model, and so to second order the KL, stays below δ.

    Args:
        product: v ↦ H v, [n] to [n].
        direction: x, float [n].
        max_kl: δ > 0.
    Returns: step [n]; 0 for a direction of 0, or of no curvature, along which no length is the right one.
    Raises: ValueError if max_kl is not positive.
    Source: Schulman et al. 2015, arXiv:1502.05477, appendix C.
    """
    require_positive(max_kl=max_kl)
    scale = direction.abs().amax() if direction.numel() else direction.sum()
    unit = direction / scale  # the length of x does not matter, and its square may not be a float
    curvature = unit @ product(unit) if scale > 0 else scale
    return unit * (2 * max_kl / curvature).sqrt() if curvature > 0 else torch.zeros_like(direction)


def backtracking_line_search(
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    step: Tensor,
    *,
    max_kl: float,
    shrink: float = 0.8,
    tries: int = 10,
) -> LineSearch:
    """Take the longest of the steps 1, α, α², … times `step` that lowers the surrogate and keeps KL ≤ δ.

    A surrogate or divergence that is not finite is a failure, as is no improvement at all. If every try fails, or a
    closure raises, the parameters hold again what they held, bit for bit.

    Args:
        surrogate, kl, parameters: as in `trust_region_step`; called without gradient.
        step: float [n], flat, in the order of the parameters.
        max_kl: δ > 0.
        shrink: α, between 0 and 1.
        tries: steps tried at most, ≥ 1.
    Returns: what happened, numbers only.
    Raises: ValueError if a number is outside its range, the step is not [n] or a closure gives no scalar.
    Source: Schulman et al. 2015, arXiv:1502.05477, appendix C.
    """
    require_positive(max_kl=max_kl)
    if not 0 < shrink < 1 or tries < 1:
        raise ValueError(f"shrink is {shrink} and tries {tries}: expected a number between 0 and 1, and at least 1")
    sizes = [parameter.numel() for parameter in _nonempty(parameters)]
    if list(step.shape) != [sum(sizes)]:
        raise ValueError(f"step is {list(step.shape)}, expected [{sum(sizes)}], the parameters' numbers")
    found = LineSearch(False, 0.0, 0.0, 0.0)
    with torch.no_grad():
        before = _value("surrogate", surrogate)
        originals = [parameter.clone() for parameter in parameters]
        try:
            for fraction in (shrink**exponent for exponent in range(tries)):
                for parameter, original, part in zip(parameters, originals, torch.split(step, sizes), strict=True):
                    parameter.copy_(original + fraction * part.view_as(original))
                improvement, divergence = before - _value("surrogate", surrogate), _value("kl", kl)
                if 0 < improvement < torch.inf and divergence <= max_kl:
                    found = LineSearch(True, fraction, divergence, improvement)
                    break
        finally:
            if not found.accepted:
                for parameter, original in zip(parameters, originals, strict=True):
                    parameter.copy_(original)
    return found


def _value(name: str, closure: Callable[[], Tensor]) -> float:
    value = closure()
    _require_scalar(name, value)
    return value.item()


def _nonempty(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    if not parameters:
        raise ValueError("parameters are empty, expected at least one tensor")
    return parameters


def _require_scalar(name: str, value: Tensor) -> None:
    if value.dim():
        raise ValueError(f"{name} is {list(value.shape)}, expected a scalar: take its mean over the batch")


def _require_at_least_0(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < torch.inf:
            raise ValueError(f"{name} is {value}, expected a finite number of at least 0")
