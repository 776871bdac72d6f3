"""Which weights of a model are trained, and how fast those of each layer."""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from taurl.runtime.errors import InputError

ADAPTED_EMBEDDING = ".lora_embedding_"  # what peft calls the weights of an embedding's adapter
LAYER = re.compile(r"\.(\d+)\.")  # the first number in a parameter's name is that of its layer


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters untrained whose names match one of the patterns (`*`, `?`, `[0-9]`).

    Raises: InputError for a pattern that matches none, or patterns that leave nothing to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied weights go by either name
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            close = difflib.get_close_matches(pattern, parameters, n=1, cutoff=0.3) or list(parameters)[:1]
            raise InputError(f"freeze is {pattern!r}, which no weight's name matches; one of them is {close[0]}")
        for name in matching:
            parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(f"freeze is {', '.join(patterns)}, which leaves no weight to train")


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Factors of the learning rate by parameter name: 1 for the head, and `decay` times more with each layer below.

    The lowest layer of n has decayⁿ and the embeddings decayⁿ⁺¹; norms above the layers count with the head.

    Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.2.
    """
    if decay == 1:
        return {}
    embeddings = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ADAPTED_EMBEDDING in name or isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    }
    layers = {name: int(found[1]) for name, _ in model.named_parameters() if (found := LAYER.search(name))}
    count = max(layers.values(), default=-1) + 1
    factors = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            factors[name] = decay ** (count + 1)
        elif name in layers:
            factors[name] = decay ** (count - layers[name])
    return factors
