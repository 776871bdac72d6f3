import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_policy import save_tiny_policy, tiny_model, tiny_tokenizer

from taurl.llm.models import policies
from taurl.llm.models.loading import load_model
from taurl.llm.models.policies import Policy, base_name, make_generator, share_weights, switch_off_dropout
from taurl.llm.settings import LoraSettings
from taurl.runtime.errors import InputError

IDS = torch.tensor([[3, 32, 43, 33, 1, 4]])


def test_dropout_is_off_even_in_training_mode():
    model = tiny_model(attention_dropout=0.5)
    policy = Policy(model, tiny_tokenizer(), gradient_checkpointing=True)
    assert policy.model.training  # transformers checkpoints activations in training mode only
    with torch.no_grad():
        assert torch.equal(policy.model(IDS).logits, policy.model(IDS).logits)
        expected = tiny_model()(IDS).logits
    torch.testing.assert_close(policy.model(IDS).logits, expected)


def test_dropout_modules_and_attributes_are_found():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3))
    block.dropout = 0.1
    switch_off_dropout(block)
    assert block[1].p == block.dropout == 0.0


def test_a_model_object_is_trained_in_place_in_its_own_dtype_unless_one_is_given():
    model = tiny_model(dtype=torch.bfloat16)
    assert Policy(model, tiny_tokenizer()).model is model
    assert model.dtype == torch.bfloat16
    assert Policy(model, tiny_tokenizer(), dtype=torch.float32).model.dtype == torch.float32


def test_the_tokenizer_of_a_model_object_is_found_by_its_name(tmp_path):
    folder = save_tiny_policy(tmp_path / "tiny")
    model = load_model(str(folder), dtype=torch.float32)
    assert Policy(model).tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(InputError, match="does not know its name; give its tokenizer"):
        Policy(tiny_model())


def test_nothing_to_train_and_an_adapter_on_an_adapter_are_refused():
    frozen = tiny_model().requires_grad_(False)
    with pytest.raises(InputError, match="has no weights to train: all are frozen"):
        Policy(frozen, tiny_tokenizer())
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="has an adapter already"):
        Policy(adapted, tiny_tokenizer(), LoraSettings(lora_rank=2))


def test_the_reference_keeps_the_starting_weights_and_only_where_it_is_asked_for():
    policy = Policy(tiny_model().train(), tiny_tokenizer(), keep_reference=True)
    assert not policy._reference.training
    with torch.no_grad():
        before = policy.model(IDS).logits
        policy.model.model.norm.weight.mul_(2)
        with policy.reference() as reference:
            assert torch.equal(reference(IDS).logits, before)
        assert not torch.equal(policy.model(IDS).logits, before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    with pytest.raises(AssertionError, match="keep_reference"), Policy(tiny_model(), tiny_tokenizer()).reference():
        pass


def test_the_reference_of_an_adapter_that_the_model_brings_is_the_adapter_as_it_came():
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    policy = Policy(adapted, tiny_tokenizer(), keep_reference=True)
    weights = [weight for name, weight in policy.model.named_parameters() if "lora_" in name]
    with torch.no_grad():
        before = policy.model(IDS).logits
        for weight in weights:
            weight.mul_(2)
        with policy.reference() as reference:
            assert torch.equal(reference(IDS).logits, before)
        assert not torch.equal(policy.model(IDS).logits, before)
    assert all(weight.requires_grad for weight in weights)
    own, copied = (dict(model.named_parameters()) for model in (policy.model, reference))
    apart = {name for name in own if own[name] is not copied[name]}
    assert apart
    assert all("lora_" in name for name in apart)  # the base stands once


def test_new_adapters_are_in_bfloat16_where_the_weights_are_but_not_doras():
    def dtypes(dtype, **settings):
        policy = Policy(tiny_model(), tiny_tokenizer(), LoraSettings(lora_rank=2, **settings), dtype=dtype)
        return {weight.dtype for weight in policy.model.parameters() if weight.requires_grad}

    assert dtypes(torch.float32) == {torch.float32}
    assert dtypes(torch.bfloat16) == {torch.bfloat16}
    assert dtypes(torch.bfloat16, use_dora=True) == dtypes(torch.float16) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_beside_the_policys_own_begins_as_its_copy(dtype):
    settings = LoraSettings(lora_rank=2, lora_targets=("q_proj", "down_proj"))
    policy = Policy(tiny_model(), tiny_tokenizer(), settings, dtype=dtype)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    policy.add_adapter("critic")
    assert {weight.dtype for _, weight in policy.adapter_parameters("critic")} == {dtype}
    ids = torch.tensor([[5, 6, 7]])
    own = policy.model(ids).logits
    with policy.adapter("critic") as model:
        assert torch.equal(model(ids).logits, own)
    with policy.model.disable_adapter():
        assert not torch.allclose(policy.model(ids).logits, own)


def test_an_adapter_names_its_base_so_that_it_is_found_again(tmp_path, monkeypatch):
    save_tiny_policy(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    policy = Policy("tiny", settings=LoraSettings(lora_rank=2, lora_alpha=4))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        expected = policy.model(IDS).logits
    policy.export(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "tiny")
    monkeypatch.chdir("/")
    loaded = load_model(str(tmp_path / "adapter"), dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert base_name("owner/name", "/somewhere/snapshots/12ab") == "owner/name"
    assert base_name("smollm2-135m-instruct", "/somewhere/cached") == "/somewhere/cached"
    assert base_name("", "") == ""


def test_an_exported_folder_loads_as_the_same_model(tmp_path, capfd):
    policy = Policy(tiny_model(), tiny_tokenizer())
    policy.export(tmp_path / "out")
    assert capfd.readouterr().err == ""  # no progress bars
    loaded = load_model(str(tmp_path / "out"), dtype=torch.float32)
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not list(tmp_path.glob("out/*.bin"))


def test_an_adapter_is_merged_into_a_copy_made_on_the_cpu(monkeypatch):
    adapted = get_peft_model(tiny_model(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    policy = Policy(adapted, tiny_tokenizer())
    expected = policy.model(IDS).logits
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda *_: pytest.fail("copied beside the model"))
    merged = policy.merged()
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not {id(weight) for weight in merged.parameters()} & {id(weight) for weight in adapted.parameters()}
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())


def test_what_an_adapter_has_learned_in_a_few_steps_is_merged_and_not_rounded_away(tmp_path):
    adapted = get_peft_model(tiny_model().bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]))
    weights = dict(adapted.named_parameters())
    name = next(name for name in weights if "lora_B" in name)
    weights[name].data.fill_(1e-5)
    a = weights[name.replace("lora_B", "lora_A")]
    base = adapted.get_submodule(name.partition(".lora_B")[0]).base_layer.weight
    learned = adapted.peft_config["default"].lora_alpha / 2 * weights[name].float() @ a.float()
    Policy(adapted, tiny_tokenizer()).export(tmp_path / "out", merge=True)
    loaded = load_model(str(tmp_path / "out"), dtype=None)
    found = loaded.get_parameter(name.partition("base_model.model.")[2].partition(".lora_B")[0] + ".weight")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found - base.float(), learned, atol=1e-7, rtol=0.01)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["q_proj"]])
def test_a_merged_adapter_of_the_embeddings_leaves_the_head_that_shares_them_as_it_was(tmp_path, targets):
    adapted = get_peft_model(tiny_model(tie_word_embeddings=True), LoraConfig(r=2, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_()
    policy = Policy(adapted, tiny_tokenizer())
    expected = policy.model(IDS).logits
    policy.export(tmp_path / "out", merge=True)
    loaded = load_model(str(tmp_path / "out"), dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.config.tie_word_embeddings is (len(targets) == 1)


def test_more_sequences_are_sampled_together_on_a_gpu(monkeypatch):
    monkeypatch.setattr(policies, "SlotSampler", lambda model, **options: options["slots"])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert make_generator("slots", model, tokenizer, None) == 64
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert [make_generator("slots", model, tokenizer, slots) for slots in (None, 5)] == [256, 5]


def test_equal_frozen_weights_are_shared_a_tied_head_with_them():
    trunk, other = (tiny_model(tie_word_embeddings=True).requires_grad_(False) for _ in range(2))
    size = sum(weight.nbytes for weight in other.parameters())
    assert share_weights(other, trunk) == size
    assert other.lm_head.weight is other.model.embed_tokens.weight is trunk.lm_head.weight
    assert share_weights(other, trunk) == 0


def test_one_name_of_a_module_is_enough_for_an_adapter():
    for targets in ("q_proj", ("q_proj",)):
        policy = Policy(tiny_model(), tiny_tokenizer(), LoraSettings(lora_rank=1, lora_targets=targets))
        factors = [name for name, _ in policy.model.named_parameters() if "lora_" in name]
        assert len(factors) == 4  # two in each of two layers
        assert all("q_proj" in name for name in factors)
