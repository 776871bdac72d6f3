"""Packed linear layers and attention of one query: the same numbers, fresh after each update, no trace afterwards."""

import copy

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from tiny_models import prompts_of, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from taurl.llm.generation import Sampling, SlotSampler
from taurl.llm.generation.attention import NAME, one_query_attention
from taurl.llm.generation.fused import beside, fusible_layers
from taurl.llm.generation.packed import PackedLinears, can_pack
from taurl.llm.generation.slot_model import SlotModel
from taurl.llm.models.compiled import compile_layers
from taurl.llm.models.heads import causal_lm
from taurl.llm.scoring.likelihood import completion_logprobs
from taurl.llm.scoring.rollouts import Rollout

IDS = torch.tensor([[5, 17, 99, 3, 42]])
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)]
pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="oneDNN is not in this build of torch")


def logits(model, packed=None):
    with torch.inference_mode():
        if packed is None:
            return model(IDS, use_cache=False).logits
        with packed.in_place():
            return model(IDS, use_cache=False).logits


def packed_count(model):
    packed = PackedLinears(model)
    with torch.inference_mode(), packed.in_place():
        return sum("forward" in vars(module) for module in model.modules())


def with_lora(base, **settings):
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=False).eval()  # as Policy has them
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 1, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_what_a_plain_one_does(dtype, shape, bias):
    layer = nn.Linear(7, 5, bias=bias, dtype=dtype)
    hidden = torch.randn(*shape[:-1], 14, dtype=dtype)[..., ::2]
    with torch.inference_mode():
        expected = nn.functional.linear(hidden.double(), layer.weight.double(), layer.bias.double() if bias else None)
        with PackedLinears(layer).in_place():
            found = layer(hidden)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_every_linear_layer_and_the_head_is_packed_and_adapters_within():
    assert packed_count(tiny_model("llama")) == 2 * 7 + 1
    assert packed_count(tiny_model("phi")) == 2 * 6 + 1
    assert packed_count(tiny_model("gpt2")) == 1  # its layers are not nn.Linear
    model = with_lora(tiny_model("llama"))
    assert packed_count(model) == 2 * 7 + 1  # merged: neither the bases nor the adapters one by one
    packed = PackedLinears(model)
    torch.testing.assert_close(logits(model, packed), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_an_adapter_has_learned_in_a_few_steps_is_sampled_from(dtype):
    """Less than half a step of bfloat16 of most weights: merged into them, it would be rounded away."""
    model = with_lora(tiny_model("llama", dtype=dtype), r=8, lora_alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() * (1e-3 if "lora_B" in name else 1)
    layer, packed = causal_lm(model).model.layers[0].mlp.up_proj, PackedLinears(model)
    hidden = torch.randn(4096, layer.in_features, dtype=dtype)
    with torch.inference_mode():
        with packed.in_place():
            found = layer(hidden).double()
        base = nn.functional.linear(hidden.double(), layer.base_layer.weight.double())
        a, b = (layer.get_submodule(name)["default"].weight.double() for name in ("lora_A", "lora_B"))
        learned = hidden.double() @ a.T @ b.T
    share = ((found - base) * learned).sum() / learned.square().sum()  # rounding of the outputs averages out
    assert share == pytest.approx(1, abs=0.05)


def test_adapters_beside_their_weights_are_added_as_peft_adds_them(monkeypatch):
    """As in half precision; here in float32, where a mistake can be told from rounding."""
    monkeypatch.setattr("taurl.llm.generation.packed.is_half", lambda dtype: True)
    model = with_lora(tiny_model("llama"))
    packed = PackedLinears(model)
    torch.testing.assert_close(logits(model, packed), logits(model), atol=1e-4, rtol=1e-4)
    set_by_copy(model)
    torch.testing.assert_close(logits(model, packed), logits(model), atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, packed), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only", "lora_bias": True}])
def test_an_adapter_that_does_more_is_not_merged(settings):
    base = tiny_model("phi")
    model = with_lora(base, **settings)
    torch.testing.assert_close(logits(model, PackedLinears(model)), logits(model), atol=1e-4, rtol=1e-4)


def set_by_optimizer(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    model(IDS, use_cache=False).logits.square().sum().backward()
    optimizer.step()


def set_by_copy(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 1.5)


def set_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # torch does not count it


def set_other_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def set_by_state(model):
    model.load_state_dict({name: value * 1.5 for name, value in copy.deepcopy(model.state_dict()).items()})


def set_parameters(model):
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach() * 1.5)


CHANGES = [set_by_optimizer, set_by_copy, set_through_data, set_other_data, set_by_state, set_parameters]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_packed_again(change, adapted):
    model = with_lora(tiny_model("llama")) if adapted else tiny_model("llama")
    packed = PackedLinears(model)
    before = logits(model, packed)
    change(model)
    after = logits(model, packed)
    torch.testing.assert_close(after, logits(model), atol=2e-3, rtol=2e-3)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(after, logits(model, PackedLinears(model)))  # as packed anew, bit for bit: resume is exact


def test_adapters_switched_and_scaled_are_seen():
    model = with_lora(tiny_model("llama"))
    packed = PackedLinears(model)
    with model.disable_adapter():
        base = logits(model)
        torch.testing.assert_close(logits(model, packed), base, atol=1e-4, rtol=1e-4)
    full = logits(model, packed)
    assert (full - base).abs().max() > 0.1
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 0.5
    half = logits(model, packed)
    torch.testing.assert_close(half, logits(model), atol=1e-4, rtol=1e-4)
    assert (half - full).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(logits(model, packed), half, atol=1e-4, rtol=1e-4)


def test_what_has_not_changed_is_not_packed_again(monkeypatch):
    model = with_lora(tiny_model("llama"))
    packed = PackedLinears(model)
    logits(model, packed)
    weights = {layer: entry.weight for layer, entry in packed._packed.items()}
    logits(model, packed)
    assert all(packed._packed[layer].weight is weight for layer, weight in weights.items())
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.mul_(2)
    logits(model, packed)
    assert sum(packed._packed[layer].weight is not weight for layer, weight in weights.items()) == 1


def test_what_is_trained_is_let_go_before_the_update():
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    packed = PackedLinears(model)
    before = logits(model, packed)
    kept = [layer for layer in packed._packed if not layer.weight.requires_grad]
    packed.release()
    assert list(packed._packed) == kept
    assert len(kept) == 7
    torch.testing.assert_close(logits(model, packed), before, atol=0, rtol=0)
    half = with_lora(tiny_model("llama", dtype=torch.bfloat16))
    packed = PackedLinears(half)
    logits(half, packed)
    packed.release()
    assert len(packed._packed) == (1 if can_pack(torch.bfloat16) else 0)  # the head, which has no adapter


def test_float64_and_processors_without_the_operator_compute_as_before(monkeypatch):
    assert packed_count(tiny_model("llama", torch.float64)) == 0
    monkeypatch.setattr("taurl.llm.generation.packed.can_pack", lambda dtype: False)
    assert packed_count(with_lora(tiny_model("llama"))) == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_sampling_leaves_no_trace_on_the_model(adapted, fails):
    model = with_lora(tiny_model("llama")) if adapted else tiny_model("llama")
    before = {module: dict(vars(module)) for module in model.modules()}
    implementation = model.config._attn_implementation
    expected = logits(model)

    def on_token(*args):
        assert model.config._attn_implementation == NAME
        if fails:
            raise KeyboardInterrupt

    sampler = SlotSampler(model)
    try:
        sampler.generate([[1, 2]], 2, Sampling(3), on_token=on_token)
    except KeyboardInterrupt:
        assert fails
    assert model.config._attn_implementation == implementation == "sdpa"
    assert all(vars(module) == before[module] for module in model.modules())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_one_query_attends_as_a_plain_loop_says(heads, scaling, dtype):
    query = torch.randn(3, 6, 1, 4, dtype=dtype)
    key, value = torch.randn(3, heads, 5, 4, dtype=dtype), torch.randn(3, heads, 5, 2, dtype=dtype)
    visible = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    mask = torch.zeros(3, 5, dtype=dtype).masked_fill(~visible, -torch.inf)[:, None, None]
    found, weights = one_query_attention(nn.Module(), query, key, value, mask, scaling=scaling, sliding_window=3)
    assert weights is None
    assert found.shape == (3, 1, 6, 2)
    for row in range(3):
        for head in range(6):
            shared = head * heads // 6
            columns = visible[row].nonzero()[:, 0].tolist()
            scores = [float(query[row, head, 0] @ key[row, shared, c]) * (scaling or 0.5) for c in columns]
            shares = torch.tensor(scores, dtype=dtype).softmax(0)
            expected = sum(share * value[row, shared, c] for share, c in zip(shares, columns, strict=True))
            torch.testing.assert_close(found[row, 0, head], expected)


def last_logits(model, fuse, monkeypatch):
    """Logits of two prompts of unlike lengths, and of the token after them; how many layers were computed otherwise."""
    with monkeypatch.context() as patch:
        if not fuse:
            patch.setattr("taurl.llm.generation.slot_model.fusible_layers", lambda model: [])
        slots = SlotModel(model)
        with torch.inference_mode(), slots.sampling():
            count = sum("forward" in vars(m) for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
            prefilled, first = slots.prefill([[5, 17, 99, 3, 42, 8, 1, 77], [60, 2, 31]])
            cache, rows = slots.new_cache(2, 9), torch.arange(2)
            cache.copy_rows(prefilled, rows, rows, 8)
            second = slots.decode(cache, torch.tensor([9, 14]), torch.tensor([8, 3]), 9)
    return torch.stack((first, second)), count


def with_biases_everywhere():
    """A Llama with a bias in every linear layer."""
    config = tiny_model("llama").config.to_dict() | {"attention_bias": True, "mlp_bias": True}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("adapted", [None, "merged", "beside"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "biases"])
def test_fused_layers_compute_what_the_layers_do(architecture, adapted, monkeypatch):
    if adapted == "beside":  # as in half precision; here in float32, where a mistake can be told from rounding
        monkeypatch.setattr("taurl.llm.generation.packed.is_half", lambda dtype: True)
    model = with_biases_everywhere() if architecture == "biases" else tiny_model(architecture)
    model = with_lora(model) if adapted else model
    plain, none = last_logits(model, False, monkeypatch)
    fused, count = last_logits(model, True, monkeypatch)
    assert (none, count) == (0, model.config.num_hidden_layers)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_fused_layers_with_several_adapters_and_with_none_in_some_compute_what_the_layers_do(half, monkeypatch):
    monkeypatch.setattr("taurl.llm.generation.packed.is_half", lambda dtype: half)
    model = with_lora(tiny_model("qwen2"), target_modules=["k_proj", "v_proj", "up_proj"])
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.base_model.set_adapter(["default", "other"])
    plain, _ = last_logits(model, False, monkeypatch)
    fused, count = last_logits(model, True, monkeypatch)
    assert count == model.config.num_hidden_layers
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        whole = model(torch.tensor([[5, 17, 99, 3, 42, 8, 1, 77]])).logits[0, -1]
    torch.testing.assert_close(fused[0, 0], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="oneDNN multiplies no bfloat16 on this processor")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_fused_layers_round_no_more_than_the_layers_do(architecture, adapted, monkeypatch):
    model = tiny_model(architecture, dtype=torch.bfloat16)
    model = with_lora(model) if adapted else model
    plain, _ = last_logits(model, False, monkeypatch)
    fused, count = last_logits(model, True, monkeypatch)
    assert count == model.config.num_hidden_layers
    exact, _ = last_logits(copy.deepcopy(model).float(), False, monkeypatch)
    assert 0 < (fused - exact).norm() < 1.5 * (plain - exact).norm()


PARTS_OF_A_LAYER = [
    "self_attn.v_proj.weight",
    "self_attn.k_proj.bias",
    "mlp.gate_proj.weight",
    "input_layernorm.weight",
]


@pytest.mark.parametrize("part", PARTS_OF_A_LAYER)
def test_a_changed_part_of_a_fused_layer_is_seen(part, monkeypatch):
    model = tiny_model("qwen2")
    slots = SlotModel(model)

    def after_a_prompt():
        with torch.inference_mode(), slots.sampling():
            return slots.prefill([[5, 17, 99]])[1]

    before = after_a_prompt()
    assert torch.equal(after_a_prompt(), before)
    with torch.no_grad():
        model.model.layers[0].get_parameter(part).add_(
            0.5 * torch.randn(model.model.layers[0].get_parameter(part).shape)
        )
    after = after_a_prompt()
    assert (after - before).abs().max() > 0.01
    slots.packed._packed.clear()
    assert torch.equal(after_a_prompt(), after)


def test_a_changed_adapter_within_a_fused_layer_is_seen_and_frozen_layers_stay_packed():
    model = with_lora(tiny_model("llama"))
    packed, layers = PackedLinears(causal_lm(model)), fusible_layers(model)

    def packed_now():
        with packed.in_place({layer.self_attn: beside(layer) for layer in layers}) as found:
            return {module: entry.weight for module, entry in found.items()}

    before = packed_now()
    assert len(before) == 2 * 5 + 1
    with torch.no_grad():
        layers[0].self_attn.k_proj.lora_B["default"].weight.mul_(2)
    after = packed_now()
    assert [module for module in before if after[module] is not before[module]] == [layers[0].self_attn]
    for layer in layers:
        layer.requires_grad_(False)
    layers[1].self_attn.q_proj.lora_A["default"].weight.requires_grad_(True)
    packed.release()
    assert layers[0].self_attn in packed._packed
    assert layers[1].self_attn not in packed._packed


def test_layers_compiled_for_training_are_fused_for_sampling():
    model = tiny_model("llama")
    compile_layers(model, torch.device("cpu"))
    assert fusible_layers(model) == list(model.model.layers)


def listened_to(layer):
    layer.mlp.register_forward_hook(lambda *_: None)


def with_another_activation(layer):
    layer.mlp.act_fn = nn.GELU()


def with_a_norm_of_its_own(layer):
    class LlamaRMSNorm(type(layer.input_layernorm)):
        pass

    layer.input_layernorm = LlamaRMSNorm(32)


def with_a_bias_for_one(layer):
    layer.self_attn.k_proj = nn.Linear(32, 16)


@pytest.mark.parametrize("changed", [listened_to, with_another_activation, with_a_norm_of_its_own, with_a_bias_for_one])
def test_a_layer_that_is_not_quite_of_its_kind_is_left_as_it_is(changed, monkeypatch):
    model = tiny_model("llama")
    changed(model.model.layers[0])
    assert fusible_layers(model) == [model.model.layers[1]]
    plain, _ = last_logits(model, False, monkeypatch)
    found, count = last_logits(model, True, monkeypatch)
    assert count == 1
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_other_families_and_adapters_that_do_more_are_left_as_they_are():
    assert fusible_layers(tiny_model("gemma3")) == fusible_layers(tiny_model("granite")) == []
    assert fusible_layers(with_lora(tiny_model("llama"), use_dora=True)) == []
    assert fusible_layers(tiny_model("llama", dtype=torch.float64)) == []
    tuned = get_peft_model(
        tiny_model("llama"), LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    )
    assert fusible_layers(tuned) == []


def test_a_layer_that_does_more_to_its_scores_is_left_to_transformers():
    query = key = value = torch.randn(1, 2, 1, 4)
    with pytest.raises(ValueError, match="does not support `softcap`"):
        one_query_attention(nn.Module(), query, key, value, torch.zeros(1, 1, 1, 1), softcap=3.0)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3", "phi", "cohere", "granite"])
def test_log_probabilities_agree_with_the_trainers(architecture, dtype, adapted):
    model = tiny_model(architecture, dtype)
    if adapted:
        model = with_lora(model)
    prompts = prompts_of([3, 17, 8, 1])
    groups = SlotSampler(model, slots=5).generate(prompts, 4, Sampling(24))
    rollout = Rollout.of(prompts, groups, torch.device("cpu"))
    prompt_of = torch.arange(4).repeat_interleave(4)
    with torch.no_grad():
        trainers, _ = completion_logprobs(model, prompts, prompt_of, rollout.tokens, rollout.mask)
    difference = (trainers - rollout.sampler_logprobs)[rollout.mask].abs().mean()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05)
