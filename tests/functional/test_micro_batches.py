"""Promise 1 on the ground floor: the loss of a tiny policy, whole, and in parts, reordered and padded less."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taurl.functional.advantages import group_relative
from taurl.functional.aggregation import token_weights, weighted_sum
from taurl.functional.entropy import top_entropy_mask
from taurl.functional.importance import mismatch_weights, sequence_ratios, sequence_token_ratios, token_ratios
from taurl.functional.kl import k3, kl_loss, kl_penalty, kl_ratios
from taurl.functional.logprobs import chosen_logprobs
from taurl.functional.surrogates import clipped_surrogate
from taurl.functional.whitening import whiten, whitening_statistics

PROMPTS, GROUP, LENGTH, VOCABULARY, SIZE = 7, 3, 9, 17, 5
ROWS = PROMPTS * GROUP
Part = dict[str, Tensor]


def batch() -> tuple[Part, list[Tensor]]:
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
        "advantages": group_relative(rewards, scale="batch").reshape(ROWS, 1).repeat(1, LENGTH),
        "old": logprobs[0] - 2.5,
        "sampler": logprobs[1] - 2.5,
        "reference": logprobs[2] - 2.5,
        "entropies": normal(ROWS, LENGTH).abs(),  # of a pass before the update
    }
    return data, [normal(VOCABULARY, SIZE).requires_grad_(), normal(VOCABULARY, SIZE).requires_grad_()]


def policy(part: Part, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, [N, L], 0 where masked."""
    embedding, head = parameters
    mask = part["mask"]
    hidden = torch.tanh(embedding[part["tokens"]].cumsum(1))  # each position sees what came before it
    found = chosen_logprobs(hidden[mask], head, part["tokens"].roll(-1, 1)[mask], rows_per_chunk=4)
    logprobs, entropy = (torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, each) for each in found)
    return logprobs, entropy


def surrogate(part: Part, ratios: Tensor) -> Tensor:
    return clipped_surrogate(ratios, part["advantages"], clip_low=0.2, clip_high=0.28)


def grpo(part: Part, logprobs: Tensor, entropies: Tensor) -> Tensor:
    losses = surrogate(part, token_ratios(logprobs, part["old"]))
    losses = losses * mismatch_weights(part["old"], part["sampler"], part["mask"], mode="token_truncate", high=1.5)
    return losses + 0.1 * k3(logprobs, part["reference"]) - 0.01 * entropies


def gspo(part: Part, logprobs: Tensor, entropies: Tensor) -> Tensor:
    """LUSPO is the same with the aggregation "sum"."""
    losses = surrogate(part, sequence_ratios(logprobs, part["old"], part["mask"]))
    weights = mismatch_weights(part["old"], part["sampler"], part["mask"], mode="sequence_truncate", high=1.5)
    return losses * weights - 0.01 * entropies


def gspo_token(part: Part, logprobs: Tensor, entropies: Tensor) -> Tensor:
    return surrogate(part, sequence_token_ratios(logprobs, part["old"], part["mask"]))


def kl_of_sequences(part: Part, logprobs: Tensor, entropies: Tensor) -> Tensor:
    old, reference, mask = part["old"], part["reference"], part["mask"]
    ratios = kl_ratios(logprobs, old, mask, level="sequence")
    divergences = kl_loss(logprobs, reference, mask, estimator="k3", level="sequence", ratios=ratios)
    divergences = divergences + kl_loss(logprobs, reference, mask, estimator="k2", level="sequence")
    penalty = kl_penalty(old, reference, mask, level="sequence")
    part = part | {"advantages": part["advantages"] - 0.05 * penalty}
    return surrogate(part, token_ratios(logprobs, old)) + 0.1 * divergences


def kl_of_tokens(part: Part, logprobs: Tensor, entropies: Tensor) -> Tensor:
    old, reference, mask = part["old"], part["reference"], part["mask"]
    ratios = kl_ratios(logprobs, old, mask, level="token")
    divergences = kl_loss(logprobs, reference, mask, estimator="k1", level="token", ratios=ratios)
    part = part | {"advantages": part["advantages"] - 0.05 * kl_penalty(old, reference, mask)}
    return surrogate(part, token_ratios(logprobs, old)) + 0.1 * divergences


def whitened(part: Part, logprobs: Tensor, entropies: Tensor) -> Tensor:
    """Advantages that differ from token to token, by the mean and std of the whole batch."""
    advantages = whiten(part["raw"], part["mask"], statistics=(part["mean"], part["std"]))
    return surrogate(part | {"advantages": advantages}, token_ratios(logprobs, part["old"]))


def undecided_tokens(part: Part, logprobs: Tensor, entropies: Tensor) -> Tensor:
    return surrogate(part, token_ratios(logprobs, part["old"])) * part["kept"]


LOSSES = [grpo, gspo, gspo_token, kl_of_sequences, kl_of_tokens, whitened, undecided_tokens]
NUMBERS = ("mean", "std")  # of the whole batch


def once_over_the_whole_batch(data: Part, how: str) -> Part:
    mask = data["mask"]
    raw = data["advantages"] - 0.3 * (data["old"] - data["reference"])
    mean, std = whitening_statistics(raw, mask)
    length = LENGTH if how == "constant" else None
    return {
        "weights": token_weights(mask, how, length=length, dtype=torch.float64),
        "raw": raw,
        "mean": mean,
        "std": std,
        "kept": top_entropy_mask(data["entropies"], mask, share=0.4),
    }


def loss_and_gradient(parts: int, how: str, loss_of: Callable[..., Tensor], **spoiled: bool) -> tuple[Tensor, Tensor]:
    data, parameters = batch()
    data |= once_over_the_whole_batch(data, how)
    order = torch.arange(ROWS) if parts == 1 else torch.randperm(ROWS, generator=torch.Generator().manual_seed(parts))
    total = torch.zeros((), dtype=torch.float64)
    for rows in order.chunk(parts):
        part = {name: tensor if name in NUMBERS else tensor[rows] for name, tensor in data.items()}
        longest = int(part["mask"].sum(1).max()) + 1  # the roll looks one further
        part = {name: tensor if name in NUMBERS else tensor[:, :longest] for name, tensor in part.items()}
        if spoiled:  # statistics of the part in place of the whole
            part |= once_over_the_whole_batch(part, how) | {"weights": part["weights"]}
        loss = weighted_sum(loss_of(part, *policy(part, parameters)), part["weights"])
        loss.backward()
        total += loss.detach()
    return total, torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("how", ["token", "sequence", "sum", "constant"])
def test_parts_leave_loss_and_gradient_unchanged(how, loss_of):
    loss, gradient = loss_and_gradient(1, how, loss_of)
    assert gradient.norm() > 1e-3
    for parts in (3, 7):
        loss_in_parts, gradient_in_parts = loss_and_gradient(parts, how, loss_of)
        assert abs(loss_in_parts - loss) < 1e-9 * abs(loss)
        assert (gradient_in_parts - gradient).norm() < 1e-9 * gradient.norm()


@pytest.mark.parametrize("loss_of", [whitened, undecided_tokens], ids=lambda function: function.__name__)
def test_statistics_of_a_part_would_change_them(loss_of):
    _, gradient = loss_and_gradient(3, "token", loss_of)
    _, spoiled = loss_and_gradient(3, "token", loss_of, statistics_of_the_part=True)
    assert (spoiled - gradient).norm() > 1e-2 * gradient.norm()
