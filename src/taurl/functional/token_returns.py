"""The returns of `returns`, for rows of tokens [N, L].

A row is an episode, its tokens are the steps that the mask keeps. Positions masked *inside* a row, text that the
environment wrote between two turns, are no steps: the row is closed up as if they were not there, so credit crosses
them undiscounted, and the state after a turn's last token is the one before the next turn's first. They and the padding
may hold anything, and get 0. A reward for what the environment answered belongs on the token before.

Each function is its time-major namesake on the closed-up rows. V of the next state is `values` of the row's next token;
after the last one nothing follows, or, in a row that was cut off, `final_values`. So all of them need `values`, the
discounted return alone does not.
"""

import torch
from torch import Tensor

from taurl.functional._inputs import require_mask
from taurl.functional.returns import (
    discounted_returns,
    generalized_advantage,
    lambda_returns,
    n_step_returns,
    v_trace,
)


@torch.no_grad()
def token_returns(
    rewards: Tensor,
    mask: Tensor,
    *,
    discount: float,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Tensor:
    """`discounted_returns` of token sequences.

    Args:
        rewards: float [N, L].
        mask: bool [N, L], the tokens that the policy chose.
        discount: γ in [0, 1].
        truncated: bool [N], rows that were cut off; by default none, and every row terminates at its last token.
        final_values: float [N], V of the state after a truncated row's last token; anything for the other rows.
    Returns: returns, [N, L], 0 where masked; float32, or float64 if an input is. So for every function of this file.
    Raises: ValueError if shapes or dtypes do not fit, a number is out of range, or only one of `truncated` and
        `final_values` is given. So for every function of this file.
    """
    steps = _steps_of(mask, truncated, final_values, values=torch.zeros_like(rewards), rewards=rewards)
    del steps["values"]
    return _spread_out(discounted_returns(**steps, discount=discount), mask)


@torch.no_grad()
def token_n_step_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    discount: float,
    steps: int,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Tensor:
    """`n_step_returns` of token sequences.

    Args:
        rewards: float [N, L].
        values: float [N, L], V of the state in which the token was chosen.
        steps: n ≥ 1.
        mask, discount, truncated, final_values: as in `token_returns`.
    Returns: returns, [N, L], 0 where masked.
    """
    given = _steps_of(mask, truncated, final_values, values=values, rewards=rewards)
    del given["values"]
    return _spread_out(n_step_returns(**given, discount=discount, steps=steps), mask)


@torch.no_grad()
def token_lambda_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    discount: float,
    trace_decay: float,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Tensor:
    """`lambda_returns` of token sequences; `values` plus `token_generalized_advantage`.

    Args:
        rewards: float [N, L].
        values: float [N, L], V of the state in which the token was chosen.
        trace_decay: λ in [0, 1].
        mask, discount, truncated, final_values: as in `token_returns`.
    Returns: returns, [N, L], 0 where masked.
    """
    steps = _steps_of(mask, truncated, final_values, values=values, rewards=rewards)
    del steps["values"]
    return _spread_out(lambda_returns(**steps, discount=discount, trace_decay=trace_decay), mask)


@torch.no_grad()
def token_generalized_advantage(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    discount: float,
    trace_decay: float,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> Tensor:
    """`generalized_advantage` of token sequences.

    Args:
        rewards: float [N, L].
        values: float [N, L], V of the state in which the token was chosen.
        trace_decay: λ in [0, 1].
        mask, discount, truncated, final_values: as in `token_returns`.
    Returns: advantages, [N, L], 0 where masked.
    """
    steps = _steps_of(mask, truncated, final_values, values=values, rewards=rewards)
    return _spread_out(generalized_advantage(**steps, discount=discount, trace_decay=trace_decay), mask)


@torch.no_grad()
def token_v_trace(
    rewards: Tensor,
    values: Tensor,
    ratios: Tensor,
    mask: Tensor,
    *,
    discount: float,
    trace_decay: float = 1.0,
    ratio_cap: float = 1.0,
    trace_cap: float = 1.0,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`v_trace` of token sequences.

    Args:
        rewards: float [N, L].
        values: float [N, L], V of the state in which the token was chosen.
        ratios: float [N, L], π/μ of the token, not negative; from `importance.token_ratios`.
        trace_decay: λ in [0, 1].
        ratio_cap, trace_cap: ρ̄ ≥ c̄ ≥ 0; `math.inf` for none.
        mask, discount, truncated, final_values: as in `token_returns`.
    Returns: targets v and advantages A, [N, L] both, 0 where masked.
    """
    steps = _steps_of(mask, truncated, final_values, values=values, rewards=rewards, ratios=ratios)
    targets, advantages = v_trace(
        **steps, discount=discount, trace_decay=trace_decay, ratio_cap=ratio_cap, trace_cap=trace_cap
    )
    return _spread_out(targets, mask), _spread_out(advantages, mask)


def _steps_of(
    mask: Tensor, truncated: Tensor | None, final_values: Tensor | None, *, values: Tensor, **others: Tensor
) -> dict[str, Tensor]:
    """What the time-major functions take, by their names: the closed-up rows [L, N], what follows and where they end.

    Padding counts as terminated, so that nothing is read there.
    """
    require_mask(mask, values=values, **others)
    count, length = mask.shape
    if (truncated is None) != (final_values is None):
        raise ValueError("truncated and final_values belong together, found only one of them")
    if truncated is None or final_values is None:
        truncated, final_values = mask.new_zeros(count), mask.new_zeros(count, dtype=torch.float32)
    if truncated.dtype != torch.bool or not truncated.shape == final_values.shape == (count,):
        raise ValueError(
            f"truncated is {truncated.dtype} {list(truncated.shape)}, final_values {list(final_values.shape)}: "
            f"expected torch.bool [{count}] and [{count}], one per row of the mask"
        )
    steps_left = mask.sum(1) - 1 - torch.arange(length, device=mask.device)[:, None]
    cut = (steps_left == 0) & truncated
    steps = {name: _closed_up(tensor, mask) for name, tensor in {"values": values, **others}.items()}
    following = steps["values"].roll(-1, 0)  # what wraps around is not read
    return steps | {
        "next_values": torch.where(cut, final_values, following),
        "terminated": (steps_left <= 0) & ~cut,
        "truncated": cut,
    }


def _closed_up(tensor: Tensor, mask: Tensor) -> Tensor:
    """[N, L] to time-major [L, N], each row's masked-in elements first and zeros after them."""
    return torch.zeros_like(tensor).masked_scatter(_closed_up_mask(mask), tensor[mask]).T


def _spread_out(tensor: Tensor, mask: Tensor) -> Tensor:
    """Undo `_closed_up`, with zeros where masked."""
    return tensor.new_zeros(mask.shape).masked_scatter(mask, tensor.T[_closed_up_mask(mask)])


def _closed_up_mask(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
