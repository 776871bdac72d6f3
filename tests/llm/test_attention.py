"""Attention in float32 of models in bfloat16: its values and gradients, where it is used, and that a run keeps it."""

import json

import pytest
import torch
from tiny_models import prompts_of, tiny_model
from tiny_policy import high_ids, untimed
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from taurl.llm import GRPO, SFT, GRPOConfig, SFTConfig
from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.generation.packed import can_pack
from taurl.llm.models import attention
from taurl.llm.models.attention import LONGEST, NAME, attend_in_float32, attending_as_chosen
from taurl.llm.models.heads import body
from taurl.llm.models.loading import load_model
from taurl.llm.scoring.likelihood import completion_logprobs
from taurl.llm.scoring.row_attention import (
    attend_within_rows,
    attend_within_rows_in_float32,
    attending_within_rows,
)

ROWS = [{"prompt": f"{i}+{i % 3}?", "completion": str(i + i % 3)} for i in range(12)]
CONFIG = GRPOConfig
SETTINGS = {"steps": 4, "prompts_per_step": 2, "group_size": 2, "max_tokens": 5, "eval_rows": 0}


@pytest.fixture
def chosen(monkeypatch):
    """Lets a test choose for the models that are loaded."""

    def choose(in_float32):
        monkeypatch.setattr(attention, "float32_pays", lambda: in_float32)
        monkeypatch.setattr(attention.Choice, "in_float32", None)

    yield choose
    attention.Choice.in_float32 = None


def given(queries, keys, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("mask", [None, "booleans", "floats"])
def test_it_is_sdpa_of_the_widened_inputs(mask):
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    if mask:
        seen = torch.ones(5, 9, dtype=torch.bool).tril(4)[None, None]
        mask = seen if mask == "booleans" else (~seen).bfloat16() * -1e30
    tensors = given(5, 9)
    found, weights = attend_in_float32(module, *tensors, mask)
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    float_mask = mask.float() if mask is not None and mask.dtype != torch.bool else mask
    expected, _ = sdpa_attention_forward(module, *wide, float_mask)
    assert weights is None
    assert torch.equal(found, expected.bfloat16())
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found.backward(slope)
    expected.backward(slope.float())
    assert all(torch.equal(one.grad, other.grad.bfloat16()) for one, other in zip(tensors, wide, strict=True))


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (3, LONGEST + 1)])
def test_a_single_query_and_long_rows_are_left_as_they_are(queries, keys):
    module = torch.nn.Module()
    query, key, value = given(queries, keys)
    own, _ = sdpa_attention_forward(module, query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), None)
    found, _ = attend_in_float32(module, query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), None)
    assert torch.equal(found, own)


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
    with torch.no_grad():
        expected, without, found = (
            completion_logprobs(model, prompts, prompt_of, tokens, mask)[0] for model in (exact, plain, wide)
        )
    assert (found - sampled).abs().mean() < 0.05
    assert (found - expected).abs().mean() < 1.5 * (without - expected).abs().mean()


def test_rows_laid_end_to_end_are_widened_and_rounded_again():
    rows = {"row_lengths": [3, 4], "row_bounds": torch.tensor([0, 3, 7], dtype=torch.int32)}
    query, key, value = (tensor.detach()[:1] for tensor in given(7, 7))
    found, _ = attend_within_rows_in_float32(torch.nn.Module(), query, key, value, None, **rows)
    wide, _ = attend_within_rows(torch.nn.Module(), query.float(), key.float(), value.float(), None, **rows)
    assert torch.equal(found, wide.bfloat16())


def test_rows_laid_end_to_end_attend_by_it_too(chosen, folder):
    chosen(True)
    model = load_model(str(folder), dtype=torch.bfloat16)
    with attending_within_rows(model):
        assert model.config._attn_implementation == "taurl_rows_float32"
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("packing", [True, False])
def test_sft_learns_by_it(chosen, folder, tmp_path, packing):
    chosen(True)
    config = SFTConfig(
        out=tmp_path / "run", steps=2, rows_per_step=4, eval_rows=2, precision="bfloat16", packing=packing, threads=1
    )
    trainer = SFT(str(folder), ROWS, config).train()
    assert trainer.run.chosen["attention"] == "float32"
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
