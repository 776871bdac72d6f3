"""Promise 1 on the ground floor: the GRPO loss of a tiny policy, whole, and in parts, reordered and padded less."""

import pytest
import torch
from torch import Tensor

from taurl.functional.advantages import group_relative
from taurl.functional.aggregation import token_weights, weighted_sum
from taurl.functional.importance import sequence_ratios, token_ratios, truncated_weights
from taurl.functional.kl import k3
from taurl.functional.logprobs import chosen_logprobs
from taurl.functional.surrogates import clipped_surrogate

PROMPTS, GROUP, LENGTH, VOCABULARY, SIZE = 7, 3, 9, 17, 5
ROWS = PROMPTS * GROUP


def batch() -> tuple[dict[str, Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    lengths = torch.randint(1, LENGTH + 1, (ROWS,), generator=generator)
    lengths[4] = 0  # a truncated completion that an option left out
    rewards = torch.randint(2, (PROMPTS, GROUP), generator=generator).double()
    rewards[0, 1], rewards[1] = torch.nan, 1.0
    logprobs = -torch.rand(3, ROWS, LENGTH, dtype=torch.float64, generator=generator)
    data = {
        "mask": torch.arange(LENGTH) < lengths[:, None],
        "tokens": torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator),
        "advantages": group_relative(rewards, scale="batch").reshape(ROWS, 1),
        "old": logprobs[0] - 2.5,
        "sampler": logprobs[1] - 2.5,
        "reference": logprobs[2] - 2.5,
    }
    return data, [normal(VOCABULARY, SIZE).requires_grad_(), normal(VOCABULARY, SIZE).requires_grad_()]


def loss_of(part: dict[str, Tensor], parameters: list[Tensor], level: str) -> Tensor:
    embedding, head = parameters
    mask = part["mask"]
    hidden = torch.tanh(embedding[part["tokens"]].cumsum(1))  # each position sees what came before it
    found, entropy = chosen_logprobs(hidden[mask], head, part["tokens"].roll(-1, 1)[mask], rows_per_chunk=4)
    logprobs = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, found)
    entropies = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, entropy)
    old = part["old"]
    ratios = token_ratios(logprobs, old) if level == "token" else sequence_ratios(logprobs, old, mask)
    loss = clipped_surrogate(ratios, part["advantages"], clip_low=0.2, clip_high=0.28)
    loss = loss * truncated_weights(old, part["sampler"], 1.5)
    return weighted_sum(loss + 0.1 * k3(logprobs, part["reference"]) - 0.01 * entropies, part["weights"])


def loss_and_gradient(parts: int, how: str, level: str) -> tuple[Tensor, list[Tensor]]:
    data, parameters = batch()
    data["weights"] = token_weights(
        data["mask"], how, length=LENGTH if how == "constant" else None, dtype=torch.float64
    )
    order = torch.arange(ROWS) if parts == 1 else torch.randperm(ROWS, generator=torch.Generator().manual_seed(parts))
    total = torch.zeros((), dtype=torch.float64)
    for rows in order.chunk(parts):
        part = {name: tensor[rows] for name, tensor in data.items()}
        longest = int(part["mask"].sum(1).max()) + 1  # the roll looks one further
        loss = loss_of({n: t if n == "advantages" else t[:, :longest] for n, t in part.items()}, parameters, level)
        loss.backward()
        total += loss.detach()
    return total, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_parts_leave_loss_and_gradient_unchanged(how, level):
    loss, gradient = loss_and_gradient(1, how, level)
    assert all(g.norm() > 1e-3 for g in gradient)
    for parts in (3, 7):
        loss_in_parts, gradient_in_parts = loss_and_gradient(parts, how, level)
        assert abs(loss_in_parts - loss) < 1e-9 * abs(loss)
        for whole, summed in zip(gradient, gradient_in_parts, strict=True):
            assert (summed - whole).norm() < 1e-9 * whole.norm()
