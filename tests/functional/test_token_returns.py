"""Returns of token rows: by hand, and against the time-major form of each row closed up by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taurl.functional.returns import (
    discounted_returns,
    generalized_advantage,
    lambda_returns,
    n_step_returns,
    v_trace,
)
from taurl.functional.token_returns import (
    token_generalized_advantage,
    token_lambda_returns,
    token_n_step_returns,
    token_returns,
    token_v_trace,
)

NAN, INF = math.nan, math.inf
EXACT = {"rtol": 1e-11, "atol": 1e-11}
fractions = st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0])


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def every_form(
    rewards, values, ratios, mask, *, discount=0.9, trace_decay=0.8, steps=2, **cut
) -> dict[str, torch.Tensor]:
    options = {"discount": discount, "trace_decay": trace_decay}
    targets, advantages = token_v_trace(rewards, values, ratios, mask, **options, **cut)
    return {
        "discounted": token_returns(rewards, mask, discount=discount, **cut),
        "n_step": token_n_step_returns(rewards, values, mask, discount=discount, steps=steps, **cut),
        "lambda": token_lambda_returns(rewards, values, mask, **options, **cut),
        "gae": token_generalized_advantage(rewards, values, mask, **options, **cut),
        "v_trace": targets,
        "v_trace advantages": advantages,
    }


TEXT = NAN  # what the environment wrote


def test_tokens_by_hand():
    """γ = ½: the first row has text between two turns, the second is left-padded and cut off, the third is empty."""
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    rewards = double([[1, TEXT, TEXT, 2, 4, INF], [TEXT, INF, 0, TEXT, 0, 8], [TEXT] * 6])
    values = double([[1, TEXT, TEXT, 2, 3, TEXT], [TEXT, TEXT, 4, TEXT, 8, 2], [INF] * 6])
    cut = {"truncated": torch.tensor([False, True, False]), "final_values": double([NAN, 16, NAN])}
    # row 1: 4, 2 + ½·4, 1 + ½·4;  row 2: 8 + ½·16, ½·16, ½·8
    found = token_returns(rewards, mask, discount=0.5, **cut)
    assert torch.equal(found, double([[3, 0, 0, 4, 4, 0], [0, 0, 4, 0, 8, 16], [0] * 6]))
    # row 2 as if finished: 8, ½·8, ½·4
    found = token_returns(rewards, mask, discount=0.5)
    assert torch.equal(found, double([[3, 0, 0, 4, 4, 0], [0, 0, 2, 0, 4, 8], [0] * 6]))
    # δ = 1 + ½·2 − 1, 2 + ½·3 − 2, 4 − 3;  ½·8 − 4, ½·2 − 8, 8 + ½·16 − 2;  A = δ + ¼·A
    found = token_generalized_advantage(rewards, values, mask, discount=0.5, trace_decay=0.5, **cut)
    assert torch.equal(found, double([[1.4375, 0, 0, 1.75, 1, 0], [0, 0, -0.875, 0, -3.5, 14], [0] * 6]))


@settings(max_examples=50)
@given(
    st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 90), fractions, fractions, st.sampled_from([0.1, 0.6, 1])
)
def test_token_form_equals_time_major(seed, rows, length, discount, decay, density):
    """Each row alone, its tokens moved together by hand, as one episode of one environment."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < density
    rewards, values, ratios = torch.randn(3, rows, length, dtype=torch.float64, generator=generator)
    final_values = torch.randn(rows, dtype=torch.float64, generator=generator)
    truncated = torch.rand(rows, generator=generator) < 0.5
    cut = {"truncated": truncated, "final_values": final_values.masked_fill(~truncated, NAN)}
    ratios = ratios.exp()
    given = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, -INF), ratios.masked_fill(~mask, NAN)
    options = {"discount": discount, "trace_decay": decay}
    found = every_form(*given, mask, steps=3, **options, **cut)
    for tensor in found.values():
        assert not tensor[~mask].any()
    for row in range(rows):
        places = mask[row].nonzero()[:, 0]
        if not len(places):
            continue
        r, v, ratio = (tensor[row, places, None] for tensor in (rewards, values, ratios))
        last = (torch.arange(len(places)) == len(places) - 1)[:, None]
        following = torch.cat([v[1:], final_values[row].reshape(1, 1)])
        ends = last & ~truncated[row], last & truncated[row]
        targets, advantages = v_trace(r, v, following, ratio, *ends, **options)
        expected = {
            "discounted": discounted_returns(r, following, *ends, discount=discount),
            "n_step": n_step_returns(r, following, *ends, discount=discount, steps=3),
            "lambda": lambda_returns(r, following, *ends, **options),
            "gae": generalized_advantage(r, v, following, *ends, **options),
            "v_trace": targets,
            "v_trace advantages": advantages,
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name][row, places, None], tensor, **EXACT)


def test_padding_and_text_change_nothing():
    generator = torch.Generator().manual_seed(9)
    rewards, values = torch.randn(2, 3, 5, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool)
    options = {"discount": 0.9, "trace_decay": 0.8}
    expected = token_generalized_advantage(rewards, values, mask, **options)
    for places in ([0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [0, 2, 3, 6, 8]):
        wider = torch.full((2, 3, 9), NAN)
        wider[0][:, places], wider[1][:, places] = rewards, values
        found = token_generalized_advantage(*wider, wider[0].isfinite(), **options)
        assert torch.equal(found[:, places], expected)


def test_caps_and_steps_go_through():
    x = SimpleNamespace(rewards=double([[1, 0, 4]]), values=double([[0, 2, 1]]), ratios=double([[3, 2, 4]]))
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = token_n_step_returns(x.rewards, x.values, mask, discount=0.5, steps=2)
    assert found.tolist() == [[1.25, 2, 4]]  # 1 + ¼·1, ½·4, 4
    # δ = 1 + ½·2 − 0, 0 + ½·1 − 2, 4 − 1;  ρ = 3, 2, 4 under the cap 4, c = 2 throughout
    # v − V from the last: 4·3 = 12,  2·(−1.5) + ½·2·12 = 9,  3·2 + ½·2·9 = 15;  A = ρ · (δ + ½ · what follows)
    targets, advantages = token_v_trace(x.rewards, x.values, x.ratios, mask, discount=0.5, ratio_cap=4.0, trace_cap=2.0)
    assert targets.tolist() == [[15, 11, 13]]  # V = 0, 2, 1
    assert advantages.tolist() == [[19.5, 9, 12]]


def test_results_are_detached_and_of_the_widest_dtype():
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(3, 7, generator=generator) < 0.7
    rewards, values = torch.randn(2, 3, 7, generator=generator).bfloat16()
    ratios = torch.rand(3, 7, generator=generator).bfloat16().requires_grad_()
    narrow = every_form(rewards.requires_grad_(), values, ratios, mask)
    wide = every_form(rewards.double(), values, ratios, mask)
    for name, tensor in narrow.items():
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert wide[name].dtype == torch.float64
        torch.testing.assert_close(tensor.double(), wide[name], rtol=1e-5, atol=1e-5)


def test_no_rows_no_tokens_one_token():
    for shape in [(0, 3), (3, 0), (1, 1)]:
        zeros, nothing = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for mask in (nothing, ~nothing):
            assert all(tensor.shape == shape for tensor in every_form(zeros, zeros, zeros, mask).values())


def test_bad_input_is_named():
    good, never = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="belong together"):
        token_returns(good, never, discount=1.0, truncated=never[:, 0])
    with pytest.raises(ValueError, match=r"final_values \[2\]: expected torch\.bool \[4\] and \[4\]"):
        token_returns(good, never, discount=1.0, truncated=never[:, 0], final_values=good[0])
    with pytest.raises(ValueError, match="boolean mask"):
        token_generalized_advantage(good, good, good, discount=0.9, trace_decay=0.5)
    with pytest.raises(ValueError, match=r"ratios \[4, 1\]"):
        token_v_trace(good, good, good[:, :1], never, discount=0.9)
    with pytest.raises(ValueError, match="trace_decay is 2"):
        token_lambda_returns(good, good, never, discount=0.9, trace_decay=2)
    with pytest.raises(ValueError, match="steps is 0"):
        token_n_step_returns(good, good, never, discount=0.9, steps=0)
