"""Dense networks whose gradient is written out.

Automatic differentiation of two small layers costs more in bookkeeping than the products of 64 rows do. Here a network
gives its outputs together with a function that takes their gradient back, into the `.grad` that its parameters have
already. The tests hold it against automatic differentiation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from taurl.control.networks import layers

Pullback = Callable[[Tensor], Tensor]
"""From the gradient of the outputs [N, k] to that of the inputs [N, d]; sets (not: adds to) that of the parameters."""


class Dense(nn.Module):
    """`networks.layers`, with a pullback.

    Args:
        widths: of the input, the hidden layers and the output; of the input alone, it passes through.
        activation: between the layers, "relu" or "tanh".
        last_gain: scale of the output layer's weights.
        activate_last: whether the activation follows the output too.
    """

    def __init__(self, widths: Sequence[int], activation: str, *, last_gain: float, activate_last: bool = False):
        super().__init__()
        made = layers(widths, activation, last_gain=last_gain)
        self.linears = nn.ModuleList(part for part in made if isinstance(part, nn.Linear))
        self.relu = activation == "relu"
        self.activated = [True] * (len(widths) - 2) + [activate_last] * (len(widths) > 1)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        # Past the bookkeeping of modules, which costs as much as a product does.
        parts = [linear._parameters for linear in self.linears._modules.values() if linear is not None]
        return [(part["weight"], part["bias"]) for part in parts]  # type: ignore[misc]

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [.., d] → outputs [.., k]."""
        for (weight, bias), activated in zip(self._parts(), self.activated, strict=True):
            inputs = nn.functional.linear(inputs, weight, bias)
            if activated:
                inputs = inputs.relu() if self.relu else inputs.tanh()
        return inputs

    def with_pullback(self, inputs: Tensor, *, to_inputs: bool = True) -> tuple[Tensor, Pullback]:
        """Outputs [N, k] for inputs [N, d], and their pullback, to be called before the weights change.

        Both under `torch.no_grad`.

        Args:
            to_inputs: whether the gradient of the inputs is wanted; if not, that of the first layer's outputs is given.
        """
        parts = self._parts()
        seen = [inputs]
        for (weight, bias), activated in zip(parts, self.activated, strict=True):
            outputs = torch.addmm(bias, seen[-1], weight.t())
            if activated:
                outputs = outputs.relu_() if self.relu else outputs.tanh_()
            seen.append(outputs)

        def pullback(gradient: Tensor) -> Tensor:
            for place in range(len(parts) - 1, -1, -1):
                weight, bias = parts[place]
                if self.activated[place]:
                    gradient = self._before_activation(gradient, seen[place + 1])
                assert weight.grad is not None  # or it would be given back and lost
                assert bias.grad is not None
                torch.mm(gradient.t(), seen[place], out=weight.grad)
                torch.sum(gradient, 0, out=bias.grad)
                if place or to_inputs:
                    gradient = gradient.mm(weight)
            return gradient

        return seen[-1], pullback

    def _before_activation(self, gradient: Tensor, outputs: Tensor) -> Tensor:
        """The gradient of what went into the activation, from that of what came out."""
        if self.relu:
            return torch.ops.aten.threshold_backward(gradient, outputs, 0)  # type: ignore[no-any-return]
        return torch.ops.aten.tanh_backward(gradient, outputs)  # type: ignore[no-any-return]
