"""Chunked log-probabilities against loops, finite differences and the dense computation; and what they may allocate."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from taurl.functional import logprobs as module
from taurl.functional.logprobs import chosen_logprobs

OPTIONS = [{}, {"temperature": 0.7}, {"temperature": 2.5}, {"softcap": 2.0}, {"temperature": 1.6, "softcap": 1.5}]


@pytest.fixture(autouse=True, params=["nothing kept", "some kept", "all kept"])
def kept(request, monkeypatch):
    """Logits for the backward pass: a part of them, in most tests a chunk or two, or as many as fit by default."""
    some = {"nothing kept": 0, "some kept": 700, "all kept": module.KEPT_BYTES}
    monkeypatch.setattr(module, "KEPT_BYTES", some[request.param])


def example(rows=11, size=4, vocabulary=13, dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "hidden": torch.randn(rows, size, dtype=torch.float64, generator=generator),
        "weight": torch.randn(vocabulary, size, dtype=torch.float64, generator=generator),
        "bias": torch.randn(vocabulary, dtype=torch.float64, generator=generator),
    }
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return tensors | {"tokens": torch.randint(vocabulary, (rows,), generator=generator)}


def dense(hidden, weight, tokens, bias=None, temperature=1.0, softcap=None) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(tokens), distribution.entropy()


def gradients(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Of a sum that weighs every row and both outputs differently."""
    logprobs, entropy = function(**inputs, **options)
    rows = torch.arange(1, len(logprobs) + 1, dtype=logprobs.dtype)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    loss = (rows * logprobs + rows.sqrt() * entropy).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_values_equal_a_loop(options):
    inputs = example()
    logprobs, entropy = chosen_logprobs(**inputs, **options, rows_per_chunk=3)
    hidden, weight, bias = (inputs[name].tolist() for name in ("hidden", "weight", "bias"))
    temperature, cap = options.get("temperature", 1.0), options.get("softcap")
    for row, token in enumerate(inputs["tokens"].tolist()):
        logits = [
            sum(a * b for a, b in zip(hidden[row], w, strict=True)) + b0 for w, b0 in zip(weight, bias, strict=True)
        ]
        logits = [(cap * math.tanh(z / cap) if cap else z) / temperature for z in logits]
        total = math.fsum(math.exp(z) for z in logits)
        probabilities = [math.exp(z) / total for z in logits]
        assert logprobs[row].item() == pytest.approx(math.log(probabilities[token]), rel=1e-12)
        assert entropy[row].item() == pytest.approx(-math.fsum(p * math.log(p) for p in probabilities), rel=1e-12)


def test_temperature_by_hand():
    """Logits (ln 3, 0): p = (3/4, 1/4); at temperature ½ they count twice, p = (9/10, 1/10), at 2 half, √3 : 1."""
    hidden, weight = torch.tensor([[math.log(3)]] * 2), torch.tensor([[1.0], [0.0]])
    root = math.sqrt(3) / (1 + math.sqrt(3))
    for temperature, p in [(1.0, 0.75), (0.5, 0.9), (2.0, root)]:
        logprobs, entropy = chosen_logprobs(
            hidden.double(), weight.double(), torch.tensor([0, 1]), temperature=temperature
        )
        assert logprobs.tolist() == pytest.approx([math.log(p), math.log(1 - p)], rel=1e-7)
        assert entropy.tolist() == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p)] * 2, rel=1e-7)


def test_temperature_divides_the_logits_of_both_outputs_and_their_gradients():
    inputs, temperature = example(), 0.3
    cooler = {name: inputs[name].detach() / temperature for name in ("hidden", "bias")}
    cooler |= {"weight": inputs["weight"].detach().clone()}
    cooler = {name: tensor.requires_grad_() for name, tensor in cooler.items()} | {"tokens": inputs["tokens"]}
    found = chosen_logprobs(**inputs, temperature=temperature, rows_per_chunk=4)
    torch.testing.assert_close(found, chosen_logprobs(**cooler), rtol=1e-12, atol=1e-13)
    found, expected = gradients(chosen_logprobs, inputs, temperature=temperature), gradients(chosen_logprobs, cooler)
    for name, share in {"hidden": 1 / temperature, "weight": 1, "bias": 1 / temperature}.items():
        torch.testing.assert_close(found[name], share * expected[name], rtol=1e-12, atol=1e-12)


def test_entropy_grows_with_the_temperature_up_to_that_of_all_tokens_alike():
    inputs = example()
    rising = torch.stack([chosen_logprobs(**inputs, temperature=t)[1] for t in (0.05, 0.3, 1.0, 4.0, 1e6)])
    assert (rising.diff(dim=0) > 0).all()
    assert (rising[0] < math.log(2)).all()
    torch.testing.assert_close(rising[-1], torch.full_like(rising[-1], math.log(13)))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_finite_differences(options):
    inputs = example(rows=5, size=3, vocabulary=7)

    def function(hidden, weight, bias):
        return chosen_logprobs(hidden, weight, inputs["tokens"], bias=bias, **options, rows_per_chunk=2)

    assert torch.autograd.gradcheck(function, (inputs["hidden"], inputs["weight"], inputs["bias"]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output_alone(options, output):
    inputs = example()
    leaves = [inputs[name] for name in ("hidden", "weight", "bias")]
    found = torch.autograd.grad(chosen_logprobs(**inputs, **options, rows_per_chunk=4)[output].sum(), leaves)
    expected = torch.autograd.grad(dense(**inputs, **options)[output].sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_chunk_size_does_not_change_the_result(options):
    inputs = example()
    expected_values, expected = dense(**inputs, **options), gradients(dense, inputs, **options)
    for rows_per_chunk in (1, 3, 11, 100, None):
        values = chosen_logprobs(**inputs, **options, rows_per_chunk=rows_per_chunk)
        torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=1e-13)
        found = gradients(chosen_logprobs, inputs, **options, rows_per_chunk=rows_per_chunk)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_what_is_kept_is_bounded_and_saves_products(monkeypatch):
    inputs, row = example(), 13 * 8
    for kept_bytes, products in [(0, 4), (3 * row - 1, 4), (3 * row, 3), (6 * row, 2), (11 * row, 1), (12 * row, 0)]:
        monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
        outputs = chosen_logprobs(**inputs, rows_per_chunk=3)
        with monkeypatch.context() as patch:
            computed, real = [], module._logits
            patch.setattr(module, "_logits", lambda *a: (computed.append(a), real(*a))[1])  # noqa: B023
            first = torch.autograd.grad(outputs[0].sum(), inputs["hidden"], retain_graph=True)[0]
            assert len(computed) == products
            assert torch.equal(torch.autograd.grad(outputs[0].sum(), inputs["hidden"])[0], first)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight"), ("bias",)])
def test_frozen_inputs_are_left_alone(frozen):
    inputs = example()
    for name in frozen:
        inputs[name].requires_grad_(False)
    found = gradients(chosen_logprobs, inputs, rows_per_chunk=4)
    torch.testing.assert_close(found, gradients(dense, inputs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    """No further from float64 than rounding the logits to that dtype explains, and float32 where it adds up."""
    inputs = example(rows=200, size=16, vocabulary=500, dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    values = chosen_logprobs(**inputs, rows_per_chunk=7)
    assert [value.dtype for value in values] == [torch.float32, torch.float32]
    largest_logit = (exact["hidden"] @ exact["weight"].T + exact["bias"]).abs().max().item()
    tolerance = 4 * torch.finfo(dtype).eps * largest_logit
    torch.testing.assert_close([v.double() for v in values], list(dense(**exact)), rtol=0, atol=tolerance)
    found, expected = gradients(chosen_logprobs, inputs, rows_per_chunk=7), gradients(dense, exact)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert (gradient.double() - expected[name]).norm() < 4 * torch.finfo(dtype).eps * expected[name].norm()


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logprobs, entropy = chosen_logprobs(hidden, weight, torch.tensor([1, 1, 0]))
    assert logprobs.tolist() == pytest.approx([-600.0, 0.0, -math.log(3)], abs=1e-5)
    assert entropy.tolist() == pytest.approx([0.0, 0.0, math.log(3)], abs=1e-5)
    (logprobs + entropy).sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_forbidden_token_is_as_if_it_were_not_there(temperature):
    inputs = example(rows=6, size=3, vocabulary=9)
    inputs["tokens"] = inputs["tokens"].clamp(max=6)
    allowed = {name: inputs[name].detach()[:7].clone().requires_grad_() for name in ("weight", "bias")}
    allowed |= {"hidden": inputs["hidden"].detach().clone().requires_grad_(), "tokens": inputs["tokens"]}
    forbidding = inputs["bias"].detach().clone()
    forbidding[7:] = -math.inf
    inputs["bias"] = forbidding.requires_grad_()
    options = {"temperature": temperature, "rows_per_chunk": 4}
    found, expected = chosen_logprobs(**inputs, **options), chosen_logprobs(**allowed, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    found, expected = gradients(chosen_logprobs, inputs, **options), gradients(chosen_logprobs, allowed, **options)
    torch.testing.assert_close(found["hidden"], expected["hidden"], rtol=1e-12, atol=1e-13)
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name][:7], expected[name], rtol=1e-12, atol=1e-13)
        assert not found[name][7:].any()
    inputs["tokens"] = torch.full((6,), 8)
    logprobs, entropy = chosen_logprobs(**inputs, **options)
    assert logprobs.isneginf().all()
    assert entropy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forbidden_token_in_lower_precision(dtype):
    inputs = example(rows=4, size=3, vocabulary=5, dtype=dtype)
    inputs["tokens"] = inputs["tokens"].clamp(max=3)
    inputs["bias"] = inputs["bias"].detach().index_fill(0, torch.tensor([4]), -math.inf).requires_grad_()
    assert all(value.isfinite().all() for value in chosen_logprobs(**inputs))
    assert all(gradient.isfinite().all() for gradient in gradients(chosen_logprobs, inputs).values())
    leaves = [inputs["hidden"], inputs["bias"]]
    large = torch.autograd.grad(1e30 * chosen_logprobs(**inputs)[1].sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in large)


def test_one_token_allowed_has_no_entropy():
    bias = torch.tensor([-math.inf, 0.0, -math.inf], requires_grad=True)
    logprobs, entropy = chosen_logprobs(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([1]), bias=bias)
    assert [logprobs.item(), entropy.item()] == [0, 0]
    (logprobs + entropy).sum().backward()
    assert not bias.grad.any()


def test_the_gradient_has_no_gradient_of_its_own():
    inputs = example()
    loss = sum(output.sum() for output in chosen_logprobs(**inputs))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, inputs["hidden"], create_graph=True)


def test_no_rows():
    inputs = example(rows=0)
    assert [value.shape for value in chosen_logprobs(**inputs)] == [(0,), (0,)]
    assert not any(gradient.any() for gradient in gradients(chosen_logprobs, inputs).values())


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor had that any operation returned, views of the given ones aside."""

    def __init__(self, *given: Tensor):
        super().__init__()
        self.elements = 0
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_neither_pass_makes_a_tensor_of_all_logits():
    rows, size, vocabulary, chunk = 64, 3, 50, 4
    inputs = example(rows, size, vocabulary, torch.bfloat16)
    with LargestTensor() as recorder:
        gradients(chosen_logprobs, inputs, temperature=0.9, softcap=3.0, rows_per_chunk=chunk)
    assert chunk * vocabulary <= recorder.elements <= max(chunk * vocabulary, rows * size, vocabulary * size)
    with LargestTensor() as recorder:
        gradients(dense, inputs)
    assert recorder.elements == rows * vocabulary  # the recorder would have seen it


def test_default_chunk_holds_its_memory(monkeypatch):
    inputs = example(rows=64, size=3, vocabulary=50)
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 50 * 8)  # five rows of float64
    with LargestTensor() as recorder:
        gradients(chosen_logprobs, inputs)
    assert recorder.elements == 5 * 50

    class OnGpu(Tensor):
        is_cuda = True

    with LargestTensor() as recorder:
        chosen_logprobs(**inputs | {"hidden": inputs["hidden"].detach().as_subclass(OnGpu)})
    assert recorder.elements == 8 * 5 * 50


def test_a_frozen_weight_costs_nothing_of_its_size():
    inputs = example(rows=6, size=40, vocabulary=50)
    for frozen in (True, False):
        inputs["weight"].requires_grad_(not frozen)
        with LargestTensor(inputs["weight"]) as recorder:
            gradients(chosen_logprobs, inputs, rows_per_chunk=2)
        assert (recorder.elements < inputs["weight"].numel()) == frozen


def test_bad_input_is_named():
    inputs = example()
    with pytest.raises(ValueError, match=r"tokens \[10\]"):
        chosen_logprobs(inputs["hidden"], inputs["weight"], inputs["tokens"][:10])
    with pytest.raises(ValueError, match="one floating dtype"):
        chosen_logprobs(inputs["hidden"].float(), inputs["weight"], inputs["tokens"])
    with pytest.raises(ValueError, match=r"expected torch\.int64"):
        chosen_logprobs(inputs["hidden"], inputs["weight"], inputs["tokens"].int())
    for option in ("temperature", "softcap", "rows_per_chunk"):
        with pytest.raises(ValueError, match=f"{option} is 0"):
            chosen_logprobs(**inputs, **{option: 0})
    with pytest.raises(RuntimeError, match="out of bounds"):
        chosen_logprobs(inputs["hidden"], inputs["weight"], inputs["tokens"] - 100)


def test_a_steep_soft_cap_has_one_gradient_whether_logits_are_kept_or_not(monkeypatch):
    """Capped logits may lie further apart than what a logit of −∞ is taken for, and are finite all the same."""
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[90.0], [-70.0]], dtype=torch.float64)
    found = []
    for kept_bytes in (0, 1 << 20):
        monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight, torch.zeros(2, dtype=torch.float64))]
        logprobs, _ = chosen_logprobs(*inputs[:2], torch.tensor([1]), bias=inputs[2], temperature=0.05, softcap=30.0)
        found.append(torch.autograd.grad(logprobs.sum(), inputs))
        capped = 30 * torch.tanh(weight[1, 0] / 30)
        expected = (1 - (capped / 30) ** 2) / 0.05  # of log π to the chosen logit, whose probability is 0
        assert found[-1][2][1] == pytest.approx(float(expected), rel=1e-9)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
