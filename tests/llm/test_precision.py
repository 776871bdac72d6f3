"""A model in another precision is the one that loads from a folder in that precision."""

import pytest
import torch
from tiny_policy import tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

from taurl.llm.models.critics import make_critic
from taurl.llm.models.policies import Policy
from taurl.llm.models.precision import cast_weights

POSITIONS = torch.arange(120)[None] % 37  # far enough for a rounded frequency to be another angle


@pytest.fixture
def loaded(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()


def assert_same(model, loaded):
    own, other = (dict(each.named_buffers()) for each in (model, loaded))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) and own[name].dtype == other[name].dtype for name in own)
    assert same_outputs(model, loaded)


def same_outputs(model, loaded):
    with torch.no_grad():
        return torch.equal(model.eval()(POSITIONS)[0], loaded(POSITIONS)[0])


def test_a_model_object_is_cast_to_what_its_folder_loads_as(loaded):
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.bfloat16)
    assert policy.model.dtype == torch.bfloat16
    assert_same(policy.model, loaded)
    assert not same_outputs(tiny_model().to(torch.bfloat16), loaded)  # Module.to would not have done


@pytest.mark.parametrize("given", ["name", "object"])
def test_a_reference_has_the_positions_of_the_policy(tmp_path, given):
    tiny_model().save_pretrained(tmp_path)
    start, reference = (str(tmp_path), str(tmp_path)) if given == "name" else (tiny_model(), tiny_model())
    policy = Policy(start, tiny_tokenizer(), dtype=torch.bfloat16)
    policy.use_reference(reference)
    with policy.reference() as reference:
        assert_same(reference, policy.model)


def test_a_critic_begins_with_the_positions_of_the_policy(loaded):
    policy = Policy(loaded, tiny_tokenizer(), dtype=torch.bfloat16)
    critic = make_critic("copy", policy, torch.float32, normalized=False, gradient_checkpointing=False)
    assert_same(critic.model, policy.model.model)


def test_ties_and_other_dtypes_stay():
    model = tiny_model(tie_word_embeddings=True)
    assert cast_weights(model, torch.bfloat16) is model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    before = model.model.norm.weight.data_ptr()
    cast_weights(model, None, "cpu")
    assert model.model.norm.weight.data_ptr() == before
