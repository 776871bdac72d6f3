"""Attention with a backward pass of whole products: its gradients, where it is used, and that a run keeps it."""

import json

import pytest
import torch
from tiny_models import prompts_of, tiny_model
from tiny_policy import high_ids, untimed
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from taurl.llm import GRPO, SFT, GRPOConfig, SFTConfig
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.generation.packed import can_pack
from taurl.llm.models import attention
from taurl.llm.models.attention import (
    LONGEST,
    NAME,
    WholeProducts,
    attend,
    attend_by_whole_products,
    attending_as_chosen,
)
from taurl.llm.models.heads import body
from taurl.llm.models.loading import load_model
from taurl.llm.scoring.likelihood import completion_logprobs
from taurl.llm.scoring.row_attention import attend_within_rows, attending_within_rows

ROWS = [{"prompt": f"{i}+{i % 3}?", "completion": str(i + i % 3)} for i in range(12)]
CONFIG = GRPOConfig
SETTINGS = {"steps": 4, "prompts_per_step": 2, "group_size": 2, "max_tokens": 5, "eval_rows": 0}


@pytest.fixture
def chosen(monkeypatch):
    """Lets a test choose for the models that are loaded."""

    def choose(whole_products):
        monkeypatch.setattr(attention, "whole_products_pay", lambda: whole_products)
        monkeypatch.setattr(attention.Choice, "whole_products", None)

    yield choose
    attention.Choice.whole_products = None


def given(queries, keys, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def masked(kind, queries, keys):
    """What each of two rows sees: the second has keys that are padding."""
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).repeat(2, 1, 1, 1)
    seen[1, :, :, :2] = False
    return {"booleans": seen, "lowest": (~seen).double() * -1e30}.get(kind)


def gradients(tensors, found):
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    return torch.autograd.grad(found, tensors, slope)


@pytest.mark.parametrize("at_once", [1, 10**9])
@pytest.mark.parametrize("mask", [None, "causal", "booleans", "lowest"])
def test_in_float64_its_values_and_gradients_are_those_of_plain_attention(mask, at_once, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    tensors = given(5, 9, torch.float64)
    query, key, value = tensors
    bias, causal = masked(mask, 5, 9), mask == "causal"
    found = attend(query, key, value, bias, causal=causal, scale=0.3)
    assert type(found.grad_fn).__name__ == "WholeProductsBackward"
    scores = 0.3 * query @ key.repeat_interleave(2, 1).mT
    if causal:
        bias = torch.ones(5, 9, dtype=torch.bool).tril()
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(tensors, found), gradients(tensors, expected), rtol=1e-10, atol=1e-12)


def test_a_query_that_sees_nothing_has_no_gradient_and_leaves_the_others_theirs():
    tensors = given(5, 9, torch.float64)
    mask = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    mask[:, :, 2] = False
    found = gradients(tensors, attend(*tensors, mask, causal=False, scale=None))
    assert all(each.isfinite().all() for each in found)
    assert not found[0][:, :, 2].any()
    rest = [0, 1, 3, 4]
    others = [tensors[0][:, :, rest], *tensors[1:]]
    slope = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.autograd.grad(
        attend(*others, mask[:, :, rest], causal=False, scale=None), tensors, slope[:, :, rest]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_in_bfloat16_its_gradients_are_as_near_to_exact_ones_as_those_of_torch():
    tensors, mask = given(40, 60), masked("booleans", 40, 60)
    exact = [each.detach().double().requires_grad_() for each in tensors]
    expected = gradients(exact, attend(*exact, mask, causal=False, scale=None))
    own = attend(*tensors, mask, causal=False, scale=None)
    theirs = scaled_dot_product_attention(*tensors, mask, enable_gqa=True)
    assert torch.equal(own, theirs)
    for one, other, right in zip(gradients(tensors, own), gradients(tensors, theirs), expected, strict=True):
        assert (one - right).norm() < 1.1 * (other - right).norm()
        assert (one - right).norm() < 5e-3 * right.norm()


def test_what_underflows_has_weight_0():
    """Scores far below the largest: their weights are 0, and so are gradients through them."""
    query, key, value = given(3, 4, torch.float32)
    with torch.no_grad():
        key[:, :, 1] = 1e4
        query.abs_()
    found = gradients([query, key, value], attend(query, key, value, None, causal=False, scale=None))
    assert all(each.isfinite().all() for each in found)
    assert not found[2][:, :, [0, 2, 3]].any()


def test_masks_of_the_lowest_number_hide_and_a_query_that_sees_nothing_spoils_no_key():
    query, key, value = given(5, 9, torch.float32)
    with torch.no_grad():
        query *= 100  # scores whose exponential is infinite
    mask = masked("lowest", 5, 9).float()
    mask[:, :, 2] = -1e30
    tensors = [query, key, value]
    slope = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    slope[:, :, 2] = 0  # nobody looks at what it gives
    found = torch.autograd.grad(attend(*tensors, mask, causal=False, scale=None), tensors, slope)
    rest = [0, 1, 3, 4]
    alone = attend(query[:, :, rest], key, value, mask[:, :, rest], causal=False, scale=None)
    torch.testing.assert_close(found, torch.autograd.grad(alone, tensors, slope[:, :, rest]), rtol=1e-4, atol=1e-3)


def test_strided_inputs_and_a_last_part_that_is_smaller(monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 2 * 4 * 5 * 9)  # two rows of three at a time
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 4, 8), (3, 9, 2, 8), (3, 9, 2, 8)]  # transposed, as layers give them
    tensors = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in shapes]
    strided = [tensor.transpose(1, 2) for tensor in tensors]
    mask = torch.ones(1, 1, 5, 9, dtype=torch.bool).tril(4)
    own, theirs = (
        attend(*strided, mask, causal=False, scale=None),
        scaled_dot_product_attention(*strided, mask, enable_gqa=True),
    )
    torch.testing.assert_close(gradients(tensors, own), gradients(tensors, theirs), rtol=1e-10, atol=1e-12)


def test_elsewhere_than_on_a_cpu_it_is_transformers_own(monkeypatch):
    monkeypatch.setattr(WholeProducts, "apply", lambda *_: pytest.fail("taken"))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    tensors = [tensor.detach().to("meta").requires_grad_() for tensor in given(5, 9)]
    assert attend_by_whole_products(module, *tensors, None)[0].shape == (2, 5, 4, 8)


@pytest.mark.parametrize("rest", [{}, {"sliding_window": 3}])
def test_layers_call_it_as_sdpa(rest):
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    tensors, mask = given(5, 9), masked("booleans", 5, 9)
    found, weights = attend_by_whole_products(module, *tensors, mask, scaling=0.2, **rest)
    expected, _ = sdpa_attention_forward(module, *tensors, mask, scaling=0.2)
    assert weights is None
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(gradients(tensors, found), gradients(tensors, expected), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("queries", "keys", "rest"), [(1, 9, {}), (3, LONGEST + 1, {}), (5, 9, {"dropout": 0.5}), (5, 9, {"s_aux": 0})]
)
def test_a_single_query_long_rows_and_what_it_does_not_know_are_left_to_torch(queries, keys, rest, monkeypatch):
    monkeypatch.setattr(WholeProducts, "apply", lambda *_: pytest.fail("taken"))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    attend_by_whole_products(module, *given(queries, keys), None, **rest)


def test_without_a_gradient_it_is_torchs_kernel(monkeypatch):
    monkeypatch.setattr(WholeProducts, "apply", lambda *_: pytest.fail("taken"))
    tensors, mask = given(5, 9), masked("booleans", 5, 9)
    with torch.no_grad():
        alone = attend(*tensors, mask, causal=False, scale=None)
    monkeypatch.undo()
    assert torch.equal(alone, attend(*tensors, mask, causal=False, scale=None))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral"])
def test_models_learn_and_sample_by_it(chosen, architecture):
    """Windows, prompts of unequal lengths, forks: as near to the same model in float32 as without it."""
    chosen(True)
    exact = tiny_model(architecture)
    plain, wide = (tiny_model(architecture, torch.bfloat16) for _ in range(2))
    for model in (exact, plain, wide):
        model.load_state_dict({name: weight.bfloat16().float() for name, weight in exact.state_dict().items()})
    assert attending_as_chosen(wide).config._attn_implementation == NAME
    assert attending_as_chosen(exact).config._attn_implementation == "sdpa"
    prompts = prompts_of([9, 3, 17])
    fused = []
    groups = SlotSampler(wide, slots=4).generate(
        prompts, 2, Sampling(12), on_token=lambda *_: fused.append("forward" in vars(body(wide).layers[0]))
    )
    assert all(fused) == (can_pack(torch.bfloat16) and architecture != "gemma3")
    tokens = torch.tensor([completion.tokens for group in groups for completion in group])
    sampled = torch.tensor([completion.logprobs for group in groups for completion in group])
    mask, prompt_of = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([0, 0, 1, 1, 2, 2])
    of_models = []
    for model in (exact, plain, wide):
        logprobs, _ = completion_logprobs(model, prompts, prompt_of, tokens, mask)
        logprobs.mean().backward()
        gradient = torch.cat(
            [weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None]
        )
        of_models.append((logprobs.detach(), gradient))
    (_, expected), (_, without), (found, gradient) = of_models
    assert (found - sampled).abs().mean() < 0.05
    assert 0 < (gradient - expected).norm() < 1.2 * (without - expected).norm()
    assert not torch.equal(gradient, without)


@pytest.mark.parametrize("window", [None, 2])
def test_rows_laid_end_to_end_have_the_gradients_of_torch(window):
    rows = {"row_lengths": [3, 4], "row_bounds": torch.tensor([0, 3, 7], dtype=torch.int32)}
    tensors = [tensor.detach()[:1].requires_grad_() for tensor in given(7, 7, torch.float64)]
    own, theirs = (
        attend_within_rows(
            torch.nn.Module(), *tensors, None, sliding_window=window, whole_products=whole_products, **rows
        )[0]
        for whole_products in (True, False)
    )
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(gradients(tensors, own), gradients(tensors, theirs), rtol=1e-10, atol=1e-12)


def test_rows_laid_end_to_end_attend_by_it_too(chosen, folder):
    chosen(True)
    model = load_model(str(folder), dtype=torch.bfloat16)
    with attending_within_rows(model):
        assert model.config._attn_implementation == "taurl_rows_whole_products"
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("packing", [True, False])
def test_sft_learns_by_it(chosen, folder, tmp_path, packing):
    chosen(True)
    config = SFTConfig(
        out=tmp_path / "run", steps=2, rows_per_step=4, eval_rows=2, precision="bfloat16", packing=packing, threads=1
    )
    trainer = SFT(str(folder), ROWS, config).train()
    assert trainer.run.chosen["attention"] == "whole_products"
    exported = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert "taurl" not in json.dumps(exported)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("began", [True, False])
def test_a_run_goes_on_with_what_it_began_with(chosen, config, folder, tmp_path, began):
    chosen(began)
    whole = (
        GRPO(str(folder), ROWS, high_ids, config(precision="bfloat16", save_every=1, out=tmp_path / "whole"))
        .train()
        .run
    )
    trainer = GRPO(str(folder), ROWS, high_ids, config(precision="bfloat16", save_every=1))
    steps = trainer.steps()
    next(steps)
    next(steps)
    steps.close()
    chosen(not began)
    resumed = GRPO.resume(tmp_path / "run", dataset=ROWS, rewards=high_ids)
    assert (resumed.policy.model.config._attn_implementation == NAME) == began
    assert untimed(resumed.train().run.records()) == untimed(whole.records())


def test_nothing_is_chosen_for_float32(config, folder):
    trainer = GRPO(str(folder), ROWS, high_ids, config())
    assert "attention" not in trainer.run.chosen
    assert trainer.policy.model.config._attn_implementation == "sdpa"
