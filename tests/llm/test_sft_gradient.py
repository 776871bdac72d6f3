"""One step of SFT against plain loops over full forward passes, in float64, with its noise and its losses."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model as tiny_of
from tiny_policy import KeepFloat64, tiny_model, tiny_tokenizer

from taurl.llm import SFT, SFTConfig
from taurl.llm.data.token_rows import TokenRow
from taurl.llm.scoring.supervised import embedding_noise, part_scores, row_parts

ROWS = [{"prompt": f"{'what is ' * (i % 3)}{i}+{i}?", "completion": f"{'it is ' * (i % 2)}{2 * i}."} for i in range(7)]


@pytest.fixture(autouse=True)
def float64():
    with KeepFloat64():
        yield


def make(tmp_path, **changes):
    values = {
        "out": tmp_path / "run",
        "steps": 1,
        "rows_per_step": len(ROWS),
        "eval_rows": 0,
        "threads": 1,
        "max_grad_norm": 1e9,
        "tokens_per_part": 10_000,
        "seed": 3,
    }
    config = SFTConfig(**(values | changes))
    return SFT(tiny_model(dtype=torch.float64), ROWS, config, tokenizer=tiny_tokenizer())


def step(trainer):
    """Loss and gradients of the first step, its rows, and how many parts went through the model."""
    parts = []
    body = trainer.policy.model.model
    handle = body.register_forward_pre_hook(lambda module, args, kwargs: parts.append(1), with_kwargs=True)
    batch = trainer.data.order.take(trainer.config.rows_per_step)
    figures = trainer._update(batch, 1)
    handle.remove()
    return figures, {name: g.clone() for name, g in trainer.optimizer._gradients.items()}, batch, len(parts)


def noise_of(config, row, length, width, whole):
    """Float32, as it is drawn, of the first tokens of a row of `whole`."""
    philox = np.random.Philox(key=np.array([config.seed, 1], np.uint64), counter=[0, 0, 0, row])
    uniform = 2 * np.random.Generator(philox).random((length, width), dtype=np.float32) - 1
    return torch.from_numpy(uniform * (config.neftune_alpha / math.sqrt(whole * width))).double()


def naive(batch, config):
    """The mean loss over all trained tokens, row by row, and its gradients."""
    model = tiny_model(dtype=torch.float64)
    total, count = 0.0, sum(sum(row.trained) for row in batch)
    for number, row in enumerate(batch):
        embeddings = model.get_input_embeddings()(torch.tensor([row.ids]))
        if config.neftune_alpha:
            length, width = embeddings.shape[1:]
            last = max(i for i, trained in enumerate(row.trained) if trained)
            noise = torch.zeros(length, width, dtype=torch.float64)
            noise[:last] = noise_of(config, number, last, width, length)
            embeddings = embeddings + noise
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
        for place in range(1, len(row.ids)):
            if not row.trained[place]:
                continue
            z, token = logits[place - 1], row.ids[place]
            p = z.softmax(0)
            if config.loss_type == "dft":
                loss = p[token].detach() * -p[token].log()
            else:
                target = torch.full_like(z, config.label_smoothing / len(z))
                target[token] += 1 - config.label_smoothing
                loss = -(target * p.log()).sum()
            total = total + (loss + config.z_loss * z.exp().sum().log() ** 2) / count
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected):
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-9 * largest, name


LOSSES = [
    {},
    {"loss_type": "dft"},
    {"label_smoothing": 0.1, "z_loss": 0.01},
    {"loss_type": "dft", "z_loss": 0.1},
    {"neftune_alpha": 5.0},
]


@pytest.mark.parametrize("settings", LOSSES)
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_equals_plain_loops(tmp_path, settings, packing):
    trainer = make(tmp_path, packing=packing, **settings)
    figures, gradients, batch, parts = step(trainer)
    loss, expected = naive(batch, trainer.config)
    assert parts == 1
    assert figures["loss"] == pytest.approx(loss, rel=1e-9)
    assert_same(gradients, expected)


@pytest.mark.parametrize("settings", [{}, {"neftune_alpha": 5.0, "label_smoothing": 0.2}])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("tokens_per_part", [1, 60])
def test_the_gradient_does_not_depend_on_the_parts(tmp_path, settings, packing, tokens_per_part):
    """Rows of different numbers of targets: a mean over parts of their means would differ."""
    _, expected, _, one = step(make(tmp_path, **settings))
    trainer = make(tmp_path, packing=packing, tokens_per_part=tokens_per_part, **settings)
    _, found, _, many = step(trainer)
    assert one == 1 < many
    assert_same(found, expected)


# --- NEFTune


def rows_of(lengths):
    return [TokenRow([1] * length, [False] + [True] * (length - 1)) for length in lengths]


def test_the_norm_of_the_noise_is_about_alpha_over_root_three_whatever_the_length():
    rows = rows_of([20, 200, 1000])
    (part,) = row_parts(rows, 10_000, torch.device("cpu"), packed=True)
    noise = embedding_noise(part, rows, 64, 15.0, (0, 7))
    for start, length, row in zip(part.starts, part.lengths, part.rows, strict=True):
        own = noise[start : start + length]
        assert float(own.norm()) == pytest.approx(15 / math.sqrt(3), rel=0.05)
        bound = 15 / math.sqrt(len(rows[row].ids) * 64)
        assert 0.99 * bound < float(own.abs().max()) <= bound
        assert abs(float(own.mean())) < 0.1 * bound


def test_the_noise_of_a_row_is_its_own_in_every_step():
    rows = rows_of([9, 9])
    (part,) = row_parts(rows, 100, torch.device("cpu"), packed=True)
    noise = embedding_noise(part, rows, 8, 5.0, (0, 1))
    assert not torch.equal(noise[:8], noise[8:])
    assert torch.equal(noise, embedding_noise(part, rows, 8, 5.0, (0, 1)))
    assert not torch.equal(noise, embedding_noise(part, rows, 8, 5.0, (0, 2)))
    assert not torch.equal(noise, embedding_noise(part, rows, 8, 5.0, (1, 1)))


@pytest.mark.parametrize("architecture", ["gemma3", "granite", "gpt2"])
def test_noise_is_added_to_what_the_embedding_layer_gives(architecture):
    """Gemma's embedding layer multiplies by a scale of its own: the noise comes after it."""
    model = tiny_of(architecture, torch.float64)
    rows = [TokenRow(list(range(1, 10)), [False] + [True] * 8)]
    (part,) = row_parts(rows, 100, torch.device("cpu"), packed=False)
    noise = embedding_noise(part, rows, 32, 50.0, (0, 1))
    found = part_scores(model, part, noise).logprobs
    embeddings = model.get_input_embeddings()(part.ids) + noise
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    expected = logits.log_softmax(-1)[range(8), part.targets]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert (found - part_scores(model, part).logprobs).abs().max() > 1e-2


def test_there_is_no_noise_in_evaluation_and_no_hook_afterwards(tmp_path):
    rows = [*ROWS, {"prompt": "a?", "completion": "b"}, {"prompt": "c?", "completion": "d"}]
    config = SFTConfig(out=tmp_path / "run", steps=2, rows_per_step=3, eval_rows=2, threads=1, neftune_alpha=100.0)
    noisy = SFT(tiny_model(), rows, config, tokenizer=tiny_tokenizer())

    def without_noise(model):
        plain = config.model_copy(update={"neftune_alpha": 0.0, "out": None})
        return SFT(model, rows, plain, tokenizer=tiny_tokenizer()).evaluate()

    assert noisy.evaluate() == without_noise(tiny_model())
    noisy.train()
    model = noisy.policy.model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert noisy.evaluate() == without_noise(model)
