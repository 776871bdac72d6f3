"""AdamW with float32 masters, gradient accumulation, clipping and the learning rate's schedule."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taurl.runtime.config import TrainingConfig
from taurl.runtime.errors import RunError


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of step 1, 2, …, config.steps: linear warm-up, then constant, linear or cosine to 0."""
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
        loss: sum of the parts' losses.
        grad_norm: norm of the whole gradient before clipping.
        taken: False when loss or gradient was not finite and the weights were left alone.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    taken: bool = True

    def __call__(self, loss: Tensor) -> None:
        """Add one part's loss and its gradient."""
        self.loss += loss.item()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) on float32 masters.

    A parameter in half precision has a float32 master: gradients are added up in the master's, part by part, and the
    parameter is rounded from the master after each step; bfloat16 weights alone would lose small updates. A float32
    parameter is its own master.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig):
        self.config = config
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype in (torch.float32, torch.float64):
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float()
                self._accumulate_in_master(parameter, self.masters[name])
        matrices = [master for master in self.masters.values() if master.ndim >= 2]
        others = [master for master in self.masters.values() if master.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.non_finite_in_a_row = 0

    @staticmethod
    def _accumulate_in_master(parameter: nn.Parameter, master: Tensor) -> None:
        def move(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]

    @contextmanager
    def update(self, rate: float) -> Iterator[Update]:
        """One optimiser step: the body gives each part's loss to the Update; leaving it clips and steps.

        Raises: RunError when loss or gradient was not finite `stop_after_non_finite` times in a row.
        """
        update = Update()
        yield update
        masters = list(self.masters.values())
        update.grad_norm = float(nn.utils.clip_grad_norm_(masters, self.config.max_grad_norm))
        update.taken = math.isfinite(update.loss) and math.isfinite(update.grad_norm)
        if update.taken:
            self._step(rate)
        self.adam.zero_grad()
        self._count(update)

    def _step(self, rate: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def _count(self, update: Update) -> None:
        self.non_finite_in_a_row = 0 if update.taken else self.non_finite_in_a_row + 1
        if self.non_finite_in_a_row >= self.config.stop_after_non_finite:
            raise RunError(
                f"loss {update.loss} with gradient norm {update.grad_norm}: not finite {self.non_finite_in_a_row} "
                "times in a row (stop_after_non_finite); lower learning_rate, or resume from the last checkpoint"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moving averages, for the checkpoint."""
        found = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                found[f"{key}/{name}"] = value
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave; the parameters are rounded from their masters again."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master/{name}"])
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)
        for name, master in self.masters.items():
            state = {key.split("/", 1)[0]: value for key, value in tensors.items() if key.split("/", 1)[1] == name}
            del state["master"]
            if state:
                self.adam.state[master] = {
                    key: value.clone() if key == "step" else value.to(master.device).clone()
                    for key, value in state.items()
                }
