"""The optimiser against torch's, against plain float64 loops, and through a checkpoint."""

import math
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

from taurl.runtime.checkpoints import load_checkpoint, save_checkpoint
from taurl.runtime.config import TrainingConfig
from taurl.runtime.errors import InputError, RunError
from taurl.runtime.optimization import Optimizer, learning_rate


def config(**settings):
    return TrainingConfig(**{"max_grad_norm": math.inf, "learning_rate": 0.01, **settings})


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, {1: 1.0, 2: 1.0, 10: 1.0}),
        ("constant", 4, {1: 0.25, 2: 0.5, 4: 1.0, 5: 1.0, 10: 1.0}),
        ("linear", 0, {1: 1.0, 2: 0.9, 6: 0.5, 10: 0.1, 12: 0.1}),
        ("linear", 2, {1: 0.5, 2: 1.0, 3: 1.0, 7: 0.5, 10: 0.125}),
        ("cosine", 0, {1: 1.0, 6: 0.5, 10: (1 - math.cos(math.pi / 10)) / 2, 99: (1 - math.cos(math.pi / 10)) / 2}),
        ("cosine", 2, {1: 0.5, 3: 1.0, 7: 0.5, 10: (1 - math.cos(math.pi / 8)) / 2}),
        ("linear", 10, {1: 0.1, 10: 1.0}),
        ("linear", 20, {1: 0.05, 10: 0.5}),
    ],
)
def test_learning_rate(schedule, warmup_steps, expected):
    settings = config(learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps, steps=10)
    for step, rate in expected.items():
        assert learning_rate(step, settings) == pytest.approx(rate, rel=1e-12), step


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def some_losses(model, steps):
    generator = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        inputs = torch.randn(7, 4, generator=generator).to(dtype)
        yield lambda inputs=inputs: (model(inputs) - inputs[:, :2]).float().square().mean()


def run(model, optimizer, steps, rate=0.01, skip=0):
    for number, loss in enumerate(some_losses(model, steps)):
        if number >= skip:
            with optimizer.update(rate) as backward:
                backward(loss())


@pytest.mark.parametrize("fused", [True, False])
def test_float32_equals_torch_step_for_step(fused):
    ours, theirs = network(), network()
    optimizer = Optimizer(ours.named_parameters(), config(weight_decay=0.1, adam_betas=(0.8, 0.95)))
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, fused=fused, foreach=False)
    for number, (our_loss, their_loss) in enumerate(zip(some_losses(ours, 6), some_losses(theirs, 6), strict=True)):
        rate = 0.01 * (number + 1)
        with optimizer.update(rate) as backward:
            backward(our_loss())
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        their_loss().backward()
        adam.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0 if fused else 1e-6, atol=0 if fused else 1e-7)


def test_a_plain_float64_loop():
    """AdamW as its paper's algorithm 2 has it, a weight at a time, clipped before, with decay on the matrix only."""
    matrix, vector = nn.Parameter(torch.tensor([[1.0, -2.0]]).double()), nn.Parameter(torch.tensor([0.5]).double())
    settings = config(max_grad_norm=1.0, weight_decay=0.1, adam_betas=(0.8, 0.9), adam_epsilon=1e-2)
    optimizer = Optimizer([("matrix", matrix), ("vector", vector)], settings)
    weights = [1.0, -2.0, 0.5]
    first, second = [0.0] * 3, [0.0] * 3
    for step, gradient in enumerate([(3.0, 4.0, 12.0), (0.1, -0.2, 0.05), (-30.0, 1.0, 0.0)], start=1):
        with optimizer.update(0.05) as backward:
            backward((matrix * torch.tensor([gradient[:2]])).sum() + vector.sum() * gradient[2])
        norm = math.sqrt(sum(part * part for part in gradient))
        assert backward.grad_norm == pytest.approx(norm)
        for index, part in enumerate(gradient):
            part *= min(1.0, 1.0 / (norm + 1e-6))  # torch's guard against a norm of 0
            first[index] = 0.8 * first[index] + 0.2 * part
            second[index] = 0.9 * second[index] + 0.1 * part * part
            if index < 2:
                weights[index] -= 0.05 * 0.1 * weights[index]
            unbiased = first[index] / (1 - 0.8**step), second[index] / (1 - 0.9**step)
            weights[index] -= 0.05 * unbiased[0] / (math.sqrt(unbiased[1]) + 1e-2)
        assert [*matrix[0].tolist(), *vector.tolist()] == pytest.approx(weights, rel=1e-9)


def constant_gradient(parameter, optimizer, steps, rate):
    for _ in range(steps):
        with optimizer.update(rate) as backward:
            backward((parameter.float() * 0.5).sum())


def test_bfloat16_keeps_the_updates_that_its_weights_alone_would_lose():
    half, full = (nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    masters, reference = (Optimizer([("w", parameter)], config()) for parameter in (half, full))
    for parameter, optimizer in ((half, masters), (full, reference)):
        constant_gradient(parameter, optimizer, 100, rate=1e-4)
    # Each step is 1e-4; bfloat16 has no number between 1 and 1 − 2⁻⁸, so one step alone rounds back to 1.
    assert torch.equal(masters.masters["w"], full)
    assert full[0, 0].item() == pytest.approx(0.99, abs=1e-5)
    assert torch.equal(half, full.bfloat16())
    assert half[0, 0].item() < 1
    alone = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    adam = torch.optim.AdamW([alone], lr=1e-4, weight_decay=0)
    for _ in range(100):
        alone.grad = torch.full_like(alone, 0.5)
        adam.step()
    assert alone[0, 0].item() == 1  # the loss that masters prevent


def gradients(model, optimizer, inputs, parts):
    with optimizer.update(0.0) as backward:
        for rows in inputs.tensor_split(parts):
            backward((model(rows) * torch.arange(1.0, 3.0, dtype=rows.dtype)).sum() / 64)
        return {name: master.grad.clone() for name, master in optimizer.masters.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_parts_of_a_batch_leave_the_gradient_unchanged(dtype):
    torch.manual_seed(0)
    model = nn.Linear(4, 2, dtype=dtype)
    optimizer = Optimizer(model.named_parameters(), config())
    # Small whole numbers add up exactly in bfloat16, so that any difference would be the accumulation's.
    inputs = torch.randint(-3, 4, (21, 4)).to(dtype) if dtype == torch.bfloat16 else torch.randn(21, 4, dtype=dtype)
    whole = gradients(model, optimizer, inputs, 1)
    weights = torch.arange(1.0, 3.0, dtype=torch.float64)
    expected = (weights[:, None] * inputs.double().sum(dim=0)) / 64
    torch.testing.assert_close(whole["weight"].double(), expected, rtol=1e-12, atol=1e-12)
    for parts in (3, 7):
        found = gradients(model, optimizer, inputs, parts)
        for name, gradient in whole.items():
            assert gradient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,), (1300, 2)])
def test_gradients_in_half_precision_are_added_whatever_their_shape(shape):
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", parameter)], config())
    parts = torch.randint(-3, 4, (2, *shape)).bfloat16()
    with optimizer.update(0.1) as backward:
        for part in parts:
            backward((parameter * part).sum() / 64)
        assert torch.equal(optimizer.masters["w"].grad, parts.float().sum(0) / 64)


def test_losses_are_read_from_the_device_when_all_parts_are_in(monkeypatch):
    parameter = nn.Parameter(torch.ones(2))
    with Optimizer([("w", parameter)], config()).update(0.1) as backward, monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the device was waited for"))
        for part in (0.1, 0.2, 0.3):
            backward((parameter * part).sum())
    assert backward.loss == sum(float(torch.tensor(part) * 2) for part in (0.1, 0.2, 0.3))


def test_small_parts_are_not_lost_beside_a_large_one():
    parameter = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", parameter)], config())
    with optimizer.update(0.1) as backward:
        backward((parameter * 256).sum())
        for _ in range(64):
            backward((parameter * 0.5).sum())  # 256 + 0.5 is 256 in bfloat16
        assert optimizer.masters["w"].grad.item() == 288
        assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_have_one_master_that_gets_both_gradients(dtype):
    embedding, head = nn.Embedding(3, 2, dtype=dtype), nn.Linear(2, 3, bias=False, dtype=dtype)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    optimizer = Optimizer(model.named_parameters(), config())
    assert list(optimizer.masters) == ["embedding.weight"]
    with optimizer.update(0.1) as backward:
        rows = torch.tensor([0, 2, 2])
        backward((embedding(rows) * torch.tensor([1.0, 2.0], dtype=dtype)).sum() + (head.weight * 3).sum())
        expected = torch.tensor([[4.0, 5.0], [3.0, 3.0], [5.0, 7.0]])
        assert torch.equal(optimizer.masters["embedding.weight"].grad.float(), expected)
    assert head.weight is embedding.weight
    assert torch.equal(head.weight, optimizer.masters["embedding.weight"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_optimiser_on_the_same_model_trains_it_too(dtype):
    model = network(dtype)
    first = Optimizer(model.named_parameters(), config())
    run(model, first, 2)
    second = Optimizer(model.named_parameters(), config())
    with second.update(0.01) as backward:
        backward(next(some_losses(model, 1))())
    assert backward.grad_norm > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_from_elsewhere_are_no_part_of_an_update(dtype):
    parameter = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = Optimizer([("w", parameter)], config())
    parameter.grad = torch.full_like(parameter, 100.0)
    with optimizer.update(0.1) as backward:
        backward(parameter.sum())
    assert backward.grad_norm == pytest.approx(2)
    with suppress(KeyError), optimizer.update(0.1) as backward:  # a body that fails leaves nothing behind
        backward(parameter.sum() * 100)
        raise KeyError
    with optimizer.update(0.1) as backward:
        backward(parameter.sum())
    assert backward.grad_norm == pytest.approx(2)
    assert parameter.grad is None


def test_leaving_all_parts_out_equals_a_gradient_of_zero():
    """AdamW moves on by its momentum; whether parts without a signal were computed must not show."""
    left_out, computed = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    for parameter in (left_out, computed):
        optimizer = Optimizer([("w", parameter)], config(weight_decay=0.1))
        constant_gradient(parameter, optimizer, 2, rate=0.1)
        before = parameter.detach().clone()
        with optimizer.update(0.1) as backward:
            if parameter is computed:
                backward((parameter * 0).sum())
        assert (backward.grad_norm, backward.loss, backward.taken) == (0.0, 0.0, True)
        assert (parameter < before).all()
    assert torch.equal(left_out, computed)


def state_of(optimizer):
    return {name: tensor.clone() for name, tensor in optimizer.tensors().items() if name != "non_finite_in_a_row"}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(dtype, how):
    parameter = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = Optimizer([("w", parameter)], config(stop_after_non_finite=3))

    def bad_update():
        with optimizer.update(0.1) as backward:
            backward(parameter.float().sum())
            # The square root of 0 has a finite value and an infinite slope.
            backward(parameter.float().sum() * math.nan if how == "loss" else (parameter.float() * 0).sum().sqrt())
        assert backward.taken is False
        assert math.isfinite(backward.loss) == (how == "gradient")

    constant_gradient(parameter, optimizer, 2, rate=0.1)
    before, weights = state_of(optimizer), parameter.detach().clone()
    bad_update()
    bad_update()
    assert equal(state_of(optimizer), before)
    assert torch.equal(parameter, weights)
    constant_gradient(parameter, optimizer, 1, rate=0.1)  # a good one resets the count
    bad_update()
    bad_update()
    before, changes = state_of(optimizer), optimizer.changes
    with pytest.raises(RunError) as error:
        bad_update()
    said = str(error.value)
    assert said.startswith("loss nan, gradient norm nan: " if how == "loss" else f"loss {parameter.sum().item():g}, ")
    assert "not finite, 3 times in a row (stop_after_non_finite)" in said
    assert "\n" not in said
    assert equal(state_of(optimizer), before)
    assert optimizer.changes == changes  # so that the finished steps can still be saved


def test_the_count_of_steps_not_taken_is_in_the_checkpoint():
    def nan_update(optimizer, parameter):
        with optimizer.update(0.1) as backward:
            backward(parameter.sum() * math.nan)

    first, second = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = Optimizer([("w", first)], config(stop_after_non_finite=3))
    nan_update(optimizer, first)
    nan_update(optimizer, first)
    restored = Optimizer([("w", second)], config(stop_after_non_finite=3))
    restored.load_tensors(optimizer.tensors())
    with pytest.raises(RunError, match="3 times in a row"):
        nan_update(restored, second)


def mixed():
    """Weights of three dtypes, one of them frozen."""
    model = network()
    model[0].to(torch.bfloat16)
    model.add_module("frozen", nn.Linear(2, 2).requires_grad_(False))
    model.add_module("last", nn.Linear(2, 1, dtype=torch.float64))
    return model


def mixed_run(model, optimizer, steps, skip=0):
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        inputs = torch.randn(6, 4, generator=generator)
        if number >= skip:
            with optimizer.update(0.01) as backward:
                hidden = model[2](model[0](inputs.bfloat16()).float().tanh())
                backward(model.last(model.frozen(hidden).double()).square().mean())


@pytest.mark.parametrize("saved_after", [0, 1, 4])
def test_a_checkpoint_continues_bit_for_bit(tmp_path, saved_after):
    whole, before, after = mixed(), mixed(), mixed()
    optimizers = [Optimizer(model.named_parameters(), config(weight_decay=0.1)) for model in (whole, before, after)]
    assert "frozen.weight" not in optimizers[0].masters
    mixed_run(whole, optimizers[0], 8)
    mixed_run(before, optimizers[1], saved_after)
    save_checkpoint(tmp_path, 1, {"optimizer": optimizers[1].tensors()}, {}, keep=1)
    mixed_run(after, optimizers[2], 3)  # what it held before is gone
    optimizers[2].load_tensors(load_checkpoint(tmp_path, 1)[0]["optimizer"])
    mixed_run(after, optimizers[2], 8, skip=saved_after)
    assert equal(state_of(optimizers[0]), state_of(optimizers[2]))
    for mine, other in zip(after.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_loaded_state_is_a_copy():
    left, right = network(), network()
    first, second = (Optimizer(model.named_parameters(), config()) for model in (left, right))
    run(left, first, 2)
    second.load_tensors(first.tensors())
    before = state_of(first)
    run(right, second, 3, skip=2)
    assert equal(state_of(first), before)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"w": (2, 3)}, r"w has shape \(2, 2\) in the checkpoint and \(2, 3\) in the model"),
        ({"w": (2, 2), "x": (1,)}, r"x has shape none in the checkpoint and \(1,\) in the model"),
        ({"v": (2, 2)}, r"v has shape none in the checkpoint and \(2, 2\) in the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(parameters, expected):
    saved = Optimizer([("w", nn.Parameter(torch.ones(2, 2)))], config()).tensors()
    other = {name: nn.Parameter(torch.ones(shape)) for name, shape in parameters.items()}
    with pytest.raises(InputError, match=expected):
        Optimizer(other.items(), config()).load_tensors(saved)
    assert all((parameter == 1).all() for parameter in other.values())


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="no parameter to train"):
        Optimizer(network().requires_grad_(False).named_parameters(), config())


def test_only_vectors_or_only_matrices():
    for shape in ((3,), (3, 1), (1, 1, 3)):
        parameter = nn.Parameter(torch.ones(shape))
        optimizer = Optimizer([("w", parameter)], config(weight_decay=0.5))
        with optimizer.update(0.1) as backward:
            backward((parameter * 0).sum())
        expected = 1.0 if len(shape) == 1 else 0.95
        assert parameter.flatten().tolist() == pytest.approx([expected] * 3)


def eight_bit_network():
    """Matrices large enough to be kept in eight bits, and vectors that are not."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))


def eight_bit_run(model, optimizer, steps, skip=0):
    generator = torch.Generator().manual_seed(5)
    for number in range(steps):
        inputs = torch.randn(7, 64, generator=generator)
        if number >= skip:
            with optimizer.update(0.001 * (number + 1)) as backward:
                backward((model(inputs) - inputs).square().mean())


def test_averages_in_eight_bits_follow_those_in_float32():
    pytest.importorskip("bitsandbytes")
    lean, full = eight_bit_network(), eight_bit_network()
    start = [parameter.detach().clone() for parameter in full.parameters()]
    optimizers = {
        states: Optimizer(model.named_parameters(), config(weight_decay=0.1, optimizer_states=states))
        for states, model in (("eight_bit", lean), ("float32", full))
    }
    eight_bit_run(lean, optimizers["eight_bit"], 6)
    eight_bit_run(full, optimizers["float32"], 6)
    for mine, other, before in zip(lean.parameters(), full.parameters(), start, strict=True):
        assert (mine - other).norm() < 0.1 * (other - before).norm()
    held = {states: sum(t.nbytes for t in each.tensors().values()) for states, each in optimizers.items()}
    masters = sum(parameter.nbytes for parameter in full.parameters())
    assert (held["eight_bit"] - masters) < 0.4 * (held["float32"] - masters)


def test_a_checkpoint_in_eight_bits_continues_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, before, after = (eight_bit_network() for _ in range(3))
    settings = config(optimizer_states="eight_bit")
    optimizers = [Optimizer(model.named_parameters(), settings) for model in (whole, before, after)]
    eight_bit_run(whole, optimizers[0], 8)
    eight_bit_run(before, optimizers[1], 4)
    save_checkpoint(tmp_path, 1, {"optimizer": optimizers[1].tensors()}, {}, keep=1)
    eight_bit_run(after, optimizers[2], 3)  # what it held before is gone
    optimizers[2].load_tensors(load_checkpoint(tmp_path, 1)[0]["optimizer"])
    eight_bit_run(after, optimizers[2], 8, skip=4)
    assert equal(state_of(optimizers[0]), state_of(optimizers[2]))


def test_eight_bits_are_refused_in_one_line_where_they_cannot_be_had(monkeypatch):
    settings = config(optimizer_states="eight_bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        InputError, match=r"needs the package bitsandbytes: in taurl's folder, pip install -e '.\[bitsandbytes\]'"
    ) as caught:
        Optimizer(network().named_parameters(), settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the model has weights in float64; give one in float32"):
        Optimizer(network(torch.float64).named_parameters(), settings)
