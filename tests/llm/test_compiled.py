"""Compiled parts of layers against the plain ones. By torch's `aot_eager`: captured and differentiated, without C++."""

import copy
import functools

import pytest
import torch
from test_heads import lora
from test_likelihood import COMPLETIONS, PROMPT_OF, PROMPTS, assert_close, assert_same_gradients, gradients, padded
from tiny_models import tiny_model

from taurl.llm.models import compiled
from taurl.llm.models.compiled import compile_layers, parts_beside_attention
from taurl.llm.scoring.likelihood import completion_logprobs
from taurl.runtime.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def captured(monkeypatch, tmp_path):
    """Where the compiled code would go, and the number of graphs that were captured."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path))
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def scores(model, completions=COMPLETIONS):
    tokens, mask = padded(completions, 0)
    return completion_logprobs(model, PROMPTS, torch.tensor(PROMPT_OF[: len(completions)]), tokens, mask)


@pytest.mark.parametrize(
    ("architecture", "graphs"),
    [
        ("llama", 2),
        ("gemma3", 2),
        ("gpt2", 2),
        ("cohere", 2),
        ("adapter", 3),  # the first layer's norm has an input without a gradient
        ("again", 2),
    ],
)
def test_values_and_gradients_are_the_same_and_each_kind_is_compiled_once(captured, architecture, graphs):
    model = tiny_model(architecture if architecture not in ("adapter", "again") else "llama", torch.float64)
    if architecture == "adapter":
        model = lora(model, target_modules="all-linear").double()
    if architecture == "again":  # computed again in the backward pass
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    expected = scores(model)
    expected_gradients = gradients(model, *expected)
    said = compile_layers(model, CPU)
    assert "first step compiles" in said
    found = scores(model)
    for values, others in zip(found, expected, strict=True):
        assert_close(values, others)
    assert_same_gradients(gradients(model, *found), expected_gradients)
    scores(model, COMPLETIONS[:3])
    scores(model, [[3, 4, 5, 6], [7, 8]])
    assert captured() == graphs


def test_inference_is_left_alone_and_passes_without_a_gradient_are_compiled_as_the_others(captured):
    model = tiny_model("llama")
    compile_layers(model, CPU)
    with torch.inference_mode():
        scores(model)
    assert captured() == 0
    with torch.no_grad():
        found = scores(model)
    assert captured() == 2
    for values, others in zip(found, scores(model), strict=True):
        assert torch.equal(values, others)
    assert captured() == 4


def test_a_copy_computes_with_its_own_weights():
    model = tiny_model("llama")
    compile_layers(model, CPU)
    other = copy.deepcopy(model)
    for part in parts_beside_attention(other):
        for parameter in part.parameters():
            parameter.data.zero_()
    expected = tiny_model("llama")
    for values, others in zip(scores(model), scores(expected), strict=True):
        assert_close(values, others, 1e-5)
    assert float((scores(other)[0] - scores(expected)[0]).abs().max()) > 0.01


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(InputError, match=r"^compile_layers: Linear has no layers that can be compiled; leave it out$"):
        compile_layers(torch.nn.Linear(1, 1), CPU)


def test_without_a_compiler_nothing_is_compiled_and_a_line_says_so(captured, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "g++-99")
    model = tiny_model("llama")
    assert compile_layers(model, CPU).startswith("compile_layers needs a C++ compiler, found no g++-99: ")
    scores(model)
    assert captured() == 0
    monkeypatch.delenv("CC", raising=False)
    said = compile_layers(tiny_model("llama"), torch.device("cuda"))
    assert said.startswith("compile_layers needs a C compiler, found no gcc or clang: ")


def test_on_a_gpu_one_c_compiler_is_enough(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name if name == "clang" else None)
    monkeypatch.delenv("CC", raising=False)
    assert "first step compiles" in compile_layers(tiny_model("llama"), torch.device("cuda"))
    monkeypatch.setenv("CC", "tcc")
    assert "found no tcc" in compile_layers(tiny_model("llama"), torch.device("cuda"))
