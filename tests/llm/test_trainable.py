"""Which weights are trained, how fast those of each layer, and what an adapter may be."""

import pytest
import torch
from tiny_policy import tiny_model, tiny_tokenizer

from taurl.llm.models.loading import load_model
from taurl.llm.models.policies import Policy
from taurl.llm.models.trainable import freeze_parameters, layer_factors
from taurl.llm.settings import LoraSettings
from taurl.runtime.config import TrainingConfig
from taurl.runtime.errors import InputError

IDS = torch.tensor([[3, 32, 43, 33, 1, 4]])


def test_factors_fall_from_the_head_to_the_embeddings():
    factors = layer_factors(tiny_model(), 0.5)
    found = {
        name: factors.get(name, 1) for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight")
    }
    assert found == {"lm_head.weight": 1, "model.norm.weight": 1, "model.embed_tokens.weight": 0.125}
    assert {f for name, f in factors.items() if ".layers.1." in name} == {0.5}
    assert {f for name, f in factors.items() if ".layers.0." in name} == {0.25}
    assert layer_factors(tiny_model(), 1.0) == {}


def test_a_head_that_shares_the_embeddings_learns_as_they_do():
    model = tiny_model(tie_word_embeddings=True)
    assert layer_factors(model, 0.5)["model.embed_tokens.weight"] == 0.125


def test_an_adapters_layers_have_factors_too():
    policy = Policy(tiny_model(), tiny_tokenizer(), LoraSettings(lora_rank=2, lora_targets=("q_proj",)))
    factors = layer_factors(policy.model, 0.5)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert {factors[name] for name in trained} == {0.25, 0.5}


def test_an_adapter_of_the_embeddings_learns_as_they_do():
    policy = Policy(tiny_model(), tiny_tokenizer(), LoraSettings(lora_rank=2, lora_targets=("embed_tokens", "q_proj")))
    factors = layer_factors(policy.model, 0.5)
    assert {factors[name] for name in factors if "lora_embedding" in name} == {0.125}


def test_the_optimiser_multiplies_its_rate_by_the_factors():
    config = TrainingConfig(learning_rate=1e-2, weight_decay=0.1)
    policy = Policy(tiny_model(), tiny_tokenizer())
    plain, scaled = policy.optimizer(config), policy.optimizer(config, layer_decay=0.5)
    assert [len(group["params"]) for group in plain.adam.param_groups] == [16, 5]
    decays = {(group["factor"], group["weight_decay"]) for group in scaled.adam.param_groups}
    assert decays == {(1, 0.1), (0.5, 0.1), (0.25, 0.1), (0.125, 0.1), (1, 0), (0.5, 0), (0.25, 0)}


def test_patterns_freeze_by_either_name_of_a_tied_weight():
    model = tiny_model(tie_word_embeddings=True)
    freeze_parameters(model, ["lm_head.weight"])
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_a_pattern_that_matches_nothing_or_everything_is_refused():
    with pytest.raises(InputError, match=r"freeze is 'model\.layer\.\*', which no weight's name matches"):
        freeze_parameters(tiny_model(), ["model.layer.*"])
    with pytest.raises(InputError, match=r"freeze is \*, which leaves no weight to train"):
        freeze_parameters(tiny_model(), ["*"])


def test_merging_leaves_the_policy_as_it_is(tmp_path):
    policy = Policy(tiny_model(), tiny_tokenizer(), LoraSettings(lora_rank=2, lora_alpha=4, use_dora=True))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        expected = policy.model(IDS).logits
        policy.export(tmp_path / "merged", merge=True)
        torch.testing.assert_close(load_model(tmp_path / "merged", dtype=torch.float32)(IDS).logits, expected)
        assert torch.equal(policy.model(IDS).logits, expected)


def test_four_bits_are_refused_where_they_cannot_be():
    with pytest.raises(InputError, match="load_in_4bit loads a model by its name; this one came as an object"):
        Policy(tiny_model(), tiny_tokenizer(), LoraSettings(lora_rank=2, load_in_4bit=True))
    with pytest.raises(InputError, match="needs a GPU with CUDA"):
        load_model("anything", dtype=torch.float32, in_4bit=True)


@pytest.mark.parametrize("name", ["use_dora", "load_in_4bit", "merge_adapter"])
def test_an_adapters_settings_need_an_adapter(name):
    with pytest.raises(ValueError, match=f"{name} needs an adapter: give lora_rank"):
        LoraSettings(**{name: True})
