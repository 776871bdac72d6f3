"""Products with the Fisher matrix through the outputs of a network, for `trust_region`.

A policy is a network, whose outputs z [N, k] are the parameters of a distribution, and the divergence is a function of
those. Where the policy has not moved the divergence is flat, so that its Hessian by the weights has one term only:

    H = Jᵀ M J,   J = ∂z/∂θ,   M = ∂²KL/∂z²
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taurl.functional._inputs import flat, require_same_shape


def output_fisher_vector_product(
    outputs: Tensor, divergence: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """v ↦ Jᵀ M J v, the product of `trust_region.fisher_vector_product` for some 2/3 of its time.

    It leaves out the term that is 0 at π_old, in exact arithmetic: the slope of the divergence times the second
    derivatives of the network. J v takes two passes of back-propagation by the trick of differentiating Jᵀu, which is
    linear in u, by u; the graph of Jᵀu is kept for all v.

    Args:
        outputs: z, float [N, k], computed with its graph at θ_old.
        divergence: z ↦ the mean of KL(π_old‖π_z), [], with π_old held fixed at `outputs`; differentiated twice.
        parameters: the leaves z depends on, n numbers in all.
    Returns: a function of a flat vector [n], in the order of the parameters, to [n] without gradient.
    Raises: ValueError if the divergence is no scalar; from the function, if the vector is not [n].
    Source: Schulman et al. 2015, arXiv:1502.05477, section C.1, the method it prefers; J v by back-propagation only:
        Townsend 2017, "A new trick for calculating Jacobian vector products".
    """
    detached = outputs.detach().requires_grad_()
    value = divergence(detached)
    if value.dim():
        raise ValueError(f"divergence is {list(value.shape)}, expected a scalar: take its mean over the batch")
    (slopes,) = torch.autograd.grad(value, detached, create_graph=True)
    unit = torch.zeros_like(outputs, requires_grad=True)
    gradient = flat(torch.autograd.grad(outputs, parameters, unit, create_graph=True, materialize_grads=True))

    def product(vector: Tensor) -> Tensor:
        require_same_shape(vector=vector, parameters=gradient)
        (change,) = torch.autograd.grad(gradient @ vector.detach().to(gradient.dtype), unit, retain_graph=True)
        (weighted,) = torch.autograd.grad(slopes, detached, change, retain_graph=True, materialize_grads=True)
        found = torch.autograd.grad(outputs, parameters, weighted, retain_graph=True, materialize_grads=True)
        return flat(found)

    return product
