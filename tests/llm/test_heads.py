import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import ARCHITECTURES, prompts_of, tiny_model
from transformers import (
    BertGenerationConfig,
    BertGenerationDecoder,
    ElectraConfig,
    ElectraForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from taurl.llm.models.heads import body, causal_lm, check_head, evaluating, output_head
from taurl.runtime.errors import InputError

IDS = torch.tensor(prompts_of([9, 9]))


def lora(model, **options):
    """The model in a peft wrapper, with an adapter that does something."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_head_of_body_equals_the_models_logits(architecture, adapter):
    model = tiny_model(architecture)
    plain = model(IDS).logits
    if adapter:
        model = lora(model, target_modules="all-linear")
    logits = model(input_ids=IDS).logits
    assert torch.equal(logits, plain) != adapter
    hidden = body(model)(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(output_head(model)(hidden), logits)
    check_head(model)


def test_a_bias_belongs_to_the_head():
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(101))
    with torch.no_grad():
        torch.testing.assert_close(output_head(model)(body(model)(IDS).last_hidden_state), model(IDS).logits)


def test_the_head_is_the_models_own_weight():
    model = tiny_model("gpt2")
    assert output_head(model).weight is model.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "value"), [("logit_scale", 1.2), ("logits_scaling", 1.2), ("final_logit_softcapping", 5.0)]
)
def test_a_head_that_is_not_what_the_config_seems_to_say_is_refused(dtype, name, value):
    model = tiny_model("llama", dtype)
    check_head(model)
    setattr(model.config, name, value)  # means nothing to Llama
    with pytest.raises(InputError, match="LlamaForCausalLM does more to its logits") as caught:
        check_head(model)
    assert "\n" not in str(caught.value)


def test_an_adapter_on_the_head_is_refused():
    with pytest.raises(InputError, match="output head of LlamaForCausalLM is Linear, expected a plain linear layer"):
        output_head(lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"]))
    with pytest.raises(InputError, match="expected a plain linear layer"):
        output_head(lora(tiny_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_an_adapter_outside_the_layers_is_refused():
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="adapter of type PROMPT_TUNING, expected one within its layers"):
        causal_lm(model)


def test_evaluating_puts_every_module_back_as_it_was():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1)))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    assert [module.training for module in model.modules()] == before


def test_a_model_that_does_something_between_body_and_head_or_names_no_body_is_refused():
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    electra = ElectraForCausalLM(ElectraConfig(**sizes, num_attention_heads=4, embedding_size=16, is_decoder=True))
    with pytest.raises(InputError, match="ElectraForCausalLM does more to its logits"):
        check_head(electra)
    llama4 = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, intermediate_size_mlp=48, pad_token_id=None))
    with pytest.raises(InputError, match="Llama4ForCausalLM names no part without its output head"):
        check_head(llama4)


def test_a_model_that_sees_the_future_is_refused():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertGenerationDecoder(BertGenerationConfig(**sizes, intermediate_size=16, initializer_range=0.5)).eval()
    with pytest.raises(InputError, match="BertGenerationDecoder sees the tokens that follow"):
        check_head(model)
