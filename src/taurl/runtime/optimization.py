"""AdamW with float32 masters, gradient accumulation, clipping and the learning rate's schedule."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taurl.runtime.config import RunConfig, TrainingConfig
from taurl.runtime.errors import InputError, RunError

# What bitsandbytes' eight bits stand for, one table for all weights.
SHARED = ("qmap1", "qmap2")

# Rows of a gradient that are added to a master's at a time: converted as one, the embeddings of SmolLM2 take 113 MB
# for it, and by rows what stays in the caches.
ROWS_AT_ONCE = 512


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of step 1, 2, …, config.steps: linear warm-up, then constant, linear or cosine to 0.

    What is left of a run past `config.steps` (a record of several environments may end there) has that of the last.
    """
    step = min(step, config.steps)
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    # The first step after the warm-up has the peak rate; the step after the last one would have 0.
    done = (step - config.warmup_steps - 1) / max(1, config.steps - config.warmup_steps)
    factor = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * factor


@dataclass
class Update:
    """One optimiser step under way: call it with each part's loss; the fields are filled as it goes.

    Attributes:
        total: float64, sum of the parts' losses, where they are.
        grad_norm: norm of the whole gradient before clipping.
        taken: False when loss or gradient was not finite and the weights were left alone.
    """

    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    grad_norm: float = 0.0
    taken: bool = True

    @property
    def loss(self) -> float:
        """The total as a number, for which a GPU is waited for."""
        return self.total.item()

    def __call__(self, loss: Tensor) -> None:
        """Add one part's loss and its gradient."""
        self.total = self.total + loss.detach().double()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) on float32 masters.

    A parameter in half precision has a float32 master: gradients are added up in the master's, part by part, and the
    parameter is rounded from the master after each step; bfloat16 weights alone would lose small updates. A float32
    parameter is its own master.

    Args:
        factors: of the learning rate, by name of the parameter; 1 where there is none.

    Attributes:
        changes: counts the updates, taken or not; what `tensors` gives changes with it only.
    Raises: InputError when there is nothing to train.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: TrainingConfig,
        *,
        factors: Mapping[str, float] | None = None,
    ):
        self.config = config
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        if not self.parameters:
            raise InputError("the model has no parameter to train: none requires a gradient")
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype in (torch.float32, torch.float64) else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        self.adam = adamw(self._groups(factors or {}), config)
        # Kept for good: taken afresh in each backward pass they come to lie between activations, and the heap grows.
        self._gradients = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.non_finite_in_a_row = 0
        self.changes = 0

    def _groups(self, factors: Mapping[str, float]) -> list[dict[str, Any]]:
        """Parameters of one factor together, matrices (which weight decay is for) before the others."""
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        for is_matrix in (True, False):
            for name, master in self.masters.items():
                if (master.ndim >= 2) == is_matrix:
                    factor = factors.get(name, 1.0)
                    decay = {} if is_matrix else {"weight_decay": 0.0}
                    group = groups.setdefault((is_matrix, factor), {"params": [], "factor": factor, **decay})
                    group["params"].append(master)
        return list(groups.values())

    @contextmanager
    def update(self, rate: float) -> Iterator[Update]:
        """One optimiser step: the body gives each part's loss to the Update; leaving it clips and steps.

        Without any part the gradient is zero, and AdamW still moves by its momentum: a part that was left out for want
        of a signal changes nothing.

        Raises: RunError when loss or gradient was not finite `stop_after_non_finite` times in a row.
        """
        update = Update()
        self._detach_gradients()  # what others left there is no part of this update
        torch._foreach_zero_(list(self._gradients.values()))
        for name, master in self.masters.items():
            master.grad = self._gradients[name]
        # Only while it lasts: hooks that stay on a model would take the gradients from its next optimiser.
        hooks = [
            parameter.register_post_accumulate_grad_hook(moving_into(self.masters[name]))  # type: ignore[no-untyped-call]
            for name, parameter in self.parameters.items()
            if self.masters[name] is not parameter
        ]
        try:
            yield update
            self._finish(update, rate)
        finally:
            for hook in hooks:
                hook.remove()
            self._detach_gradients()

    def _finish(self, update: Update, rate: float) -> None:
        masters = list(self.masters.values())
        update.grad_norm = float(nn.utils.clip_grad_norm_(masters, self.config.max_grad_norm))
        update.taken = math.isfinite(update.loss) and math.isfinite(update.grad_norm)
        if not update.taken:
            self._leave_out(update)
            return
        self.changes += 1
        self.non_finite_in_a_row = 0
        for group in self.adam.param_groups:
            group["lr"] = rate * group["factor"]
        self.adam.step()
        self._round_from_masters()

    def _leave_out(self, update: Update) -> None:
        in_a_row = self.non_finite_in_a_row + 1
        if in_a_row >= self.config.stop_after_non_finite:  # not counted: the state stays that of the last whole step
            raise RunError(
                f"loss {update.loss:g}, gradient norm {update.grad_norm:g}: not finite, {in_a_row} times in a row "
                "(stop_after_non_finite), so no step was taken; try a new run with a lower learning_rate"
            )
        self.changes += 1
        self.non_finite_in_a_row = in_a_row

    @torch.no_grad()
    def _round_from_masters(self) -> None:
        rounded = {name: weight for name, weight in self.parameters.items() if weight is not self.masters[name]}
        if rounded:
            torch._foreach_copy_(list(rounded.values()), [self.masters[name] for name in rounded])

    def _detach_gradients(self) -> None:
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Masters, moving averages, and the count of updates not taken in a row, for the checkpoint."""
        found = {"non_finite_in_a_row": torch.tensor(self.non_finite_in_a_row)}
        for name, master in self.masters.items():
            found[f"master/{name}"] = master.detach()
            for kind, value in self.adam.state.get(master, {}).items():
                if kind in SHARED:
                    value = value.clone()  # safetensors stores no tensor under two names
                found[f"{kind}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave; the parameters are rounded from their masters again.

        Raises: InputError when it was given by a model with other parameters.
        """
        self._check_fit({key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith("master/")})
        self.non_finite_in_a_row = int(tensors["non_finite_in_a_row"])
        self.adam.state.clear()
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "master":
                with torch.no_grad():
                    self.masters[name].copy_(value)
            elif name:
                master = self.masters[name]
                plain = kind == "step" and not value.is_floating_point()  # bitsandbytes counts with a Python integer
                self.adam.state[master][kind] = int(value) if plain else value.to(master.device, copy=True)
        self._round_from_masters()

    def _check_fit(self, stored: dict[str, Tensor]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        expected = {name: tuple(master.shape) for name, master in self.masters.items()}
        for name in {**expected, **shapes}:
            if shapes.get(name) != expected.get(name):
                raise InputError(
                    f"the checkpoint does not fit this model: {name} has shape {shapes.get(name, 'none')} in the "
                    f"checkpoint and {expected.get(name, 'none')} in the model; give the model that the run began with"
                )


def adamw(groups: Sequence[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, its moving averages in float32 or in eight bits.

    Eight bits are those of Dettmers et al. 2022 (arXiv:2110.02861), in blocks of 256 numbers, from the package
    bitsandbytes, which keeps tensors of fewer than 4,096 numbers in float32.

    Raises: InputError where bitsandbytes is missing, or would round a parameter in float64.
    """
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer_states == "float32":
        return torch.optim.AdamW(groups, **common, fused=True)
    if any(parameter.dtype != torch.float32 for group in groups for parameter in group["params"]):
        raise InputError("optimizer_states is eight_bit, but the model has weights in float64; give one in float32")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "optimizer_states is eight_bit, which needs the package bitsandbytes: in taurl's folder, "
            "pip install -e '.[bitsandbytes]'"
        ) from error
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, **common)
    return eight_bit


def moving_into(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's fresh gradient to its master's."""

    def move(parameter: Tensor) -> None:
        if parameter.grad is not None and master.grad is not None:
            _add(master.grad, parameter.grad)
            parameter.grad = None

    return move


def _add(total: Tensor, fresh: Tensor) -> None:
    if not total.ndim or total.device.type != "cpu":
        total += fresh
        return
    for start in range(0, len(total), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        total[rows].add_(fresh[rows])
