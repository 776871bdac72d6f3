"""Updates of small networks: one flat vector of parameters, one of gradients, and Adam on them.

A network of a dozen tensors costs more in operators launched than in arithmetic. Gradients are accumulated into one
vector, so that zeroing, measuring, clipping and stepping are one operator each, whatever the network.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taurl.runtime.config import OptimizerSettings
from taurl.runtime.errors import InputError, RunError

Figures = dict[str, Tensor]
LossFunction = Callable[..., tuple[Tensor, Figures]]

# Where a unit has died, averages of its gradient fall by a constant share until rounding holds them among the subnormal
# numbers, with which a processor takes several times as long; next to Adam's ε they are nothing. So now and then they
# become 0.
SUBNORMAL, FLUSH_EVERY = torch.finfo(torch.float32).tiny, 128


def require_fit(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of other shapes, whose run had other observations or actions. Raises: InputError."""
    for name, tensor in own.items():
        if stored[name].shape != tensor.shape:
            raise InputError(
                f"the checkpoint does not fit this environment: {name} has shape {tuple(stored[name].shape)} in the "
                f"checkpoint and {tuple(tensor.shape)} here; give the environment that the run began with"
            )


class FlatAdam:
    """Adam (Kingma and Ba 2015) with decoupled weight decay on the parameters of some modules, as one float32 vector.

    The same numbers as `runtime.optimization.Optimizer` gives, where every parameter decays alike. The modules'
    parameters become views of the vector: load values into them, do not replace them.

    Args:
        modules: what is trained, by name.
        loss: (minibatch, …) → loss and figures, computed with these modules; None for gradients set by hand.
        config: rates, bounds.

    Attributes:
        changes: counts the updates, taken or not.
        skipped: those not taken since `take_skipped`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        loss: LossFunction | None,
        config: OptimizerSettings,
    ):
        self.config, self.loss = config, loss
        # By this way parameters that modules have in common are there once.
        self.named = dict(nn.ModuleDict(dict(modules)).named_parameters())
        self.parameters = torch.cat([parameter.detach().flatten() for parameter in self.named.values()])
        self.gradient = torch.zeros_like(self.parameters)
        self.mean, self.square = torch.zeros_like(self.parameters), torch.zeros_like(self.parameters)
        self.step_count = torch.zeros(())
        self.non_finite_in_a_row = 0
        self.changes = self.skipped = 0
        for parameter, own, gradient in zip(
            self.named.values(), self._views(self.parameters), self._views(self.gradient), strict=True
        ):
            parameter.data, parameter.grad = own, gradient

    def _views(self, vector: Tensor) -> list[Tensor]:
        parts = torch.split(vector, [parameter.numel() for parameter in self.named.values()])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.named.values(), strict=True)]

    def update(self, rate: float, *inputs: Any) -> tuple[float, Figures]:
        """One step down the loss of these inputs, its gradient clipped to `max_grad_norm`.

        A gradient that is not finite takes no step. Returns the gradient's norm before clipping, and the loss's
        figures. Raises: RunError after `stop_after_non_finite` gradients in a row that were not finite.
        """
        assert self.loss is not None, "made without a loss: set the gradients and take a step"
        self.gradient.zero_()
        loss, figures = self.loss(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return self.step(rate), figures

    def step(self, rate: float) -> float:
        """One step down the gradient that the parameters' `.grad` hold already; otherwise as `update`.

        For gradients that are not found by automatic differentiation. Returns the norm before clipping.
        """
        self.changes += 1
        norm = self._descend(rate)
        self._count_non_finite(norm)
        return norm

    def _descend(self, rate: float) -> float:
        config, (beta1, beta2) = self.config, self.config.adam_betas
        norm = float(self.gradient.norm())
        if not math.isfinite(norm):
            return norm
        if norm > config.max_grad_norm:
            self.gradient.mul_(config.max_grad_norm / (norm + 1e-6))
        with torch.no_grad():
            self.step_count += 1
            # What torch.optim.AdamW(fused=True) calls, whose bookkeeping takes longer than the step of a small network.
            torch._fused_adamw_(
                [self.parameters],
                [self.gradient],
                [self.mean],
                [self.square],
                [],
                [self.step_count],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=config.weight_decay,
                eps=config.adam_epsilon,
                maximize=False,
            )
            if int(self.step_count) % FLUSH_EVERY == 0:
                for average in (self.mean, self.square):
                    torch.hardshrink(average, SUBNORMAL, out=average)
        return norm

    def _count_non_finite(self, norm: float) -> None:
        if math.isfinite(norm):
            self.non_finite_in_a_row = 0
            return
        self.skipped += 1
        self.non_finite_in_a_row += 1
        if self.non_finite_in_a_row >= self.config.stop_after_non_finite:
            raise RunError(
                f"gradient norm {norm:g}: not finite, {self.non_finite_in_a_row} times in a row "
                "(stop_after_non_finite), so no step was taken; try a new run with a lower learning_rate"
            )

    def take_skipped(self) -> int:
        """How many updates were not taken since the last call."""
        taken, self.skipped = self.skipped, 0
        return taken

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moving averages, for the checkpoint."""
        return {
            "parameters": self.parameters,
            "mean": self.mean,
            "square": self.square,
            "step_count": self.step_count,
            "non_finite_in_a_row": torch.tensor(self.non_finite_in_a_row),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave, into the vectors that the modules view.

        Raises: InputError if they do not fit.
        """
        require_fit(tensors, self.tensors())
        with torch.no_grad():
            for name in ("parameters", "mean", "square", "step_count"):
                getattr(self, name).copy_(tensors[name])
        self.non_finite_in_a_row = int(tensors["non_finite_in_a_row"])
