"""What prompts begin with in common, a template and a system's message: it need go through a model only once."""

from collections.abc import Sequence
from itertools import takewhile

import torch

# Tokens that it must save: small passes take as long as larger ones, on a GPU up to far more.
WORTH_A_PASS = {"cpu": 64}
WORTH_A_PASS_ELSEWHERE = 4096


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; of each at least one is left."""
    if not prompts:
        return 0
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


def worth_a_pass(prompts: Sequence[Sequence[int]], device: torch.device) -> int:
    """Their common beginning where a pass of its own pays, else 0."""
    tokens = common_beginning(prompts)
    saved = tokens * (len(prompts) - 1)
    return tokens if saved >= WORTH_A_PASS.get(device.type, WORTH_A_PASS_ELSEWHERE) else 0
