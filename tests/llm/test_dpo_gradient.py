"""One step of DPO and its family against the same losses in plain loops over full forward passes, in float64."""

import math

import pytest
import torch
from tiny_policy import KeepFloat64, tiny_model, tiny_tokenizer

from taurl.llm.algorithms import dpo as dpo_module
from taurl.llm.algorithms.dpo import DPO
from taurl.llm.algorithms.dpo_config import DPOConfig
from taurl.llm.algorithms.dpo_losses import sorts_the_batch

PAIRS = [
    {"prompt": "1+1?", "chosen": "2", "rejected": "3 or 4"},
    {"prompt": "what is 2+3?", "chosen": "it is 5.", "rejected": "6"},
    {"prompt": "5+5?", "chosen": "10", "rejected": "11"},
    {"prompt": "a b c d e f?", "chosen": "g h i j k l m n o p", "rejected": "q"},
    {"prompt": "9?", "chosen": "yes 9", "rejected": "no 8 is it"},
    {"prompt": "1+1?", "chosen": "2.", "rejected": "12"},
]
SINGLE = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row in PAIRS
    for kind in ("chosen", "rejected")
][:9]


@pytest.fixture(autouse=True)
def float64(monkeypatch, tmp_path):
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "cache"))
    with KeepFloat64():
        yield


def settings(tmp_path, **changes):
    values = {
        "out": tmp_path / "run",
        "steps": 1,
        "prompts_per_step": len(PAIRS),
        "eval_rows": 0,
        "threads": 1,
        "max_grad_norm": 1e9,
        "learning_rate": 1e-3,
        "beta": 0.3,
        "tokens_per_part": 10_000,
    }
    return DPOConfig(**(values | changes))


def other_model(moved=0.03):
    """The policy with its weights moved a little: log-ratios of some nats, which every divergence bears."""
    model = tiny_model(dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += moved * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def step(config, monkeypatch, rows=PAIRS, moved=0.03):
    """The record of one step, its gradient, and how many parts went forward with one."""
    reference = other_model(moved) if config.needs_reference else None
    trainer = DPO(tiny_model(dtype=torch.float64), rows, config=config, reference=reference, tokenizer=tiny_tokenizer())
    parts = []
    real = dpo_module.part_logprobs
    monkeypatch.setattr(dpo_module, "part_logprobs", lambda *a, **k: (parts.append(1), real(*a, **k))[1])
    (record,) = trainer.steps()
    monkeypatch.setattr(dpo_module, "part_logprobs", real)
    tensors = trainer.optimizer.tensors()
    # AdamW's first moment after one step is a tenth of the gradient.
    gradient = {name.removeprefix("exp_avg/"): 10 * t for name, t in tensors.items() if name.startswith("exp_avg/")}
    return record, gradient, len(parts)


def difference(one, other):
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return math.sqrt(apart / sum(float(tensor.square().sum()) for tensor in other.values()))


# --- the losses again


def token_logprobs(model, prompt, answer):
    tokenizer = tiny_tokenizer()
    before = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    after = tokenizer(f"{answer}<end>", add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
    return [row[token] - row.exp().sum().log() for row, token in zip(logits, after, strict=True)]


def log_sigmoid(x):
    return -(1 + (-x).exp()).log()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def score(x, config):
    a = config.divergence_alpha
    return {
        "reverse_kl": x,
        "js_divergence": (2 * x.exp() / (1 + x.exp())).log(),
        "forward_kl": 1 - (-x).exp(),
        "alpha_divergence": (1 - (-a * x).exp()) / a,
    }[config.divergence]


def naive_pair(name, config, w, lost, rw, rl, nw, nl, tokens, shift):
    """The loss of one pair: log-probabilities of policy and reference, lengths, mean length of chosen answers."""
    beta, e = config.strength, config.label_smoothing
    hw, hl = w - rw, lost - rl
    margin = score(hw, config) - score(hl, config)
    x = beta * margin
    smooth = lambda z: -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)  # noqa: E731
    odds = lambda p: (p.exp() / (1 - p.exp())).log()  # noqa: E731
    return {
        "sigmoid": lambda: smooth(x),
        "sigmoid_norm": lambda: smooth(beta * (score(hw, config) / nw - score(hl, config) / nl)),
        "robust": lambda: (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e),
        "exo_pair": lambda: (
            sigmoid(x) * (log_sigmoid(x) - math.log(1 - e)) + sigmoid(-x) * (log_sigmoid(-x) - math.log(e))
        ),
        "hinge": lambda: torch.clamp(1 - x, min=0),
        "ipo": lambda: (score(hw, config) / nw - score(hl, config) / nl - 1 / (2 * beta)) ** 2,
        "discopop": lambda: (
            -log_sigmoid(x) * (1 - sigmoid(x / config.discopop_temperature))
            + (-x).exp() * sigmoid(x / config.discopop_temperature)
        ),
        "nca_pair": lambda: -log_sigmoid(beta * hw) - 0.5 * log_sigmoid(-beta * hw) - 0.5 * log_sigmoid(-beta * hl),
        "bco_pair": lambda: -log_sigmoid(beta * hw - shift) - log_sigmoid(shift - beta * hl),
        "sppo_hard": lambda: (hw - 1 / (2 * beta)) ** 2 + (hl + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigmoid(beta * hw) + sigmoid(beta * hl),
        "apo_down": lambda: sigmoid(beta * hw) + 1 - sigmoid(beta * (hw - hl)),
        "sft": lambda: -w / tokens,
        "cpo": lambda: smooth(beta * (w - lost)) - config.likelihood_weight * w / tokens,
        "simpo": lambda: smooth(beta * (w / nw - lost / nl) - config.target_margin),
        "orpo": lambda: -w / nw - beta * log_sigmoid(odds(w / nw) - odds(lost / nl)),
    }[name]()


def naive_sorted(config, upper, lower):
    pairs = zip(sorted(upper, key=float), sorted(lower, key=float), strict=True)
    e = config.label_smoothing
    logits = [config.strength * (u - v) for u, v in pairs]
    return sum(-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x) for x in logits)


def weighed_sum(config, tokens, other_length):
    return sum(p * (1 if place < other_length else config.excess_weight) for place, p in enumerate(tokens))


def naive_step(config, rows=PAIRS):
    model, reference = tiny_model(dtype=torch.float64), other_model()
    pairs = []
    for row in rows:
        w, lost = (token_logprobs(model, row["prompt"], row[kind]) for kind in ("chosen", "rejected"))
        with torch.no_grad():
            rw, rl = (token_logprobs(reference, row["prompt"], row[kind]) for kind in ("chosen", "rejected"))
        sums = [weighed_sum(config, tokens, min(len(w), len(lost))) for tokens in (w, lost, rw, rl)]
        pairs.append((*sums, len(w), len(lost)))
    tokens = sum(pair[4] for pair in pairs) / len(pairs)
    shift = 0.0
    if config.reward_shift == "running":
        rewards = [config.strength * float(p[k] - p[k + 2]) for p in pairs for k in (0, 1)]
        shift = sum(rewards) / len(rewards)
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in config.mixture.items():
        if name == "aot":
            part = naive_sorted(config, [p[0] - p[1] for p in pairs], [p[2] - p[3] for p in pairs])
        elif name == "aot_unpaired":
            part = naive_sorted(config, [p[0] - p[2] for p in pairs], [p[1] - p[3] for p in pairs])
        else:
            part = sum(naive_pair(name, config, *pair, tokens, shift) for pair in pairs)
        total = total + weight * part / len(pairs)
    total.backward()
    return float(total), {name: p.grad for name, p in model.named_parameters()}, pairs


LOSSES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.1, "excess_weight": 0.4},
    {"loss_type": "sigmoid_norm", "beta": 5.0},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": "hinge"},
    {"loss_type": "ipo", "divergence": "js_divergence"},
    {"loss_type": "discopop", "divergence": "forward_kl"},
    {"loss_type": "discopop", "discopop_temperature": 0.5},
    {"loss_type": "sigmoid", "divergence": "alpha_divergence", "divergence_alpha": 0.3},
    {"loss_type": "nca_pair"},
    {"loss_type": "bco_pair"},
    {"loss_type": "bco_pair", "reward_shift": "running"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "aot", "label_smoothing": 0.1},
    {"loss_type": "aot_unpaired"},
    {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    {"loss_type": ("aot", "ipo", "simpo"), "loss_weights": (1.0, 0.1, -0.5), "target_margin": 0.5},
    {"loss_type": "cpo", "likelihood_weight": 0.7, "label_smoothing": 0.2},
    {"loss_type": "simpo"},
    {"loss_type": "orpo"},
]


@pytest.mark.parametrize("terms", LOSSES, ids=lambda terms: "-".join(map(str, terms.values())))
def test_the_gradient_is_that_of_plain_loops_however_it_is_cut(tmp_path, monkeypatch, terms):
    config = settings(tmp_path, **terms)
    loss, expected, pairs = naive_step(config)
    seen = set()
    rows_mix = sorts_the_batch(config) or config.reward_shift == "running"
    for tokens in (10_000, 80, 20) if rows_mix else (10_000, 20):
        cut = settings(tmp_path / str(tokens), **terms, tokens_per_part=tokens)
        record, gradient, parts = step(cut, monkeypatch)
        seen.add(parts)
        assert record["loss"] == pytest.approx(loss, rel=1e-9)
        assert difference(gradient, expected) < 1e-9
        assert record["logps/chosen"] == pytest.approx(sum(float(p[0]) for p in pairs) / len(pairs), rel=1e-9)
        assert record["logps/rejected"] == pytest.approx(sum(float(p[1]) for p in pairs) / len(pairs), rel=1e-9)
        rewards = naive_rewards(cut, pairs)
        assert record["rewards/chosen"] == pytest.approx(sum(w for w, _ in rewards) / len(rewards), rel=1e-9)
        assert record["rewards/margins"] == pytest.approx(sum(w - lost for w, lost in rewards) / len(rewards), rel=1e-9)
        assert record["rewards/accuracies"] == pytest.approx(sum(w > lost for w, lost in rewards) / len(rewards))
    assert min(seen) == 1
    assert max(seen) == len(PAIRS)


def naive_rewards(config, pairs):
    found = []
    for w, lost, rw, rl, nw, nl in pairs:
        if config.needs_reference:
            found.append((config.strength * float(w - rw), config.strength * float(lost - rl)))
        else:
            per_token = config.loss_type in (("simpo",), ("orpo",))
            w, lost = (float(w / nw), float(lost / nl)) if per_token else (float(w), float(lost))
            found.append((config.strength * w, config.strength * lost))
    return found


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_single_answers_with_one_reference_point_for_the_whole_batch(tmp_path, monkeypatch, loss_type):
    changes = {
        "loss_type": loss_type,
        "prompts_per_step": len(SINGLE),
        "desirable_weight": 1.3,
        "undesirable_weight": 0.8,
    }
    moved = -0.03  # where the reference point is above 0
    model, reference = tiny_model(dtype=torch.float64), other_model(moved)

    def h(prompt, answer):
        with torch.no_grad():
            base = sum(token_logprobs(reference, prompt, answer))
        return sum(token_logprobs(model, prompt, answer)) - base

    mismatched = []
    for place, row in enumerate(SINGLE):
        following = (SINGLE * 2)[place + 1 :]
        other = next(r for r in following if r["prompt"] != row["prompt"])
        others = [r["completion"] for r in SINGLE if r["prompt"] == other["prompt"]]  # chosen and rejected
        number = sum(r["prompt"] == row["prompt"] for r in SINGLE[:place])
        mismatched.append(float(h(row["prompt"], others[number % len(others)])))
    kl = max(0.0, sum(mismatched) / len(mismatched)) if loss_type == "kto" else 0.0
    assert (kl > 0) == (loss_type == "kto")
    losses = []
    for row in SINGLE:
        gain = 0.3 * (h(row["prompt"], row["completion"]) - kl)
        losses.append(1.3 * (1 - sigmoid(gain)) if row["label"] else 0.8 * (1 - sigmoid(-gain)))
    loss = sum(losses) / len(losses)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    seen = set()
    for tokens in (10_000, 80, 20):
        cut = settings(tmp_path / str(tokens), **changes, tokens_per_part=tokens)
        record, gradient, parts = step(cut, monkeypatch, SINGLE, moved)
        seen.add(parts)
        assert record["loss"] == pytest.approx(float(loss), rel=1e-9)
        assert record["kl"] == pytest.approx(kl, rel=1e-9)
        assert difference(gradient, expected) < 1e-9
    assert min(seen) == 1
    assert max(seen) > 6


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path, monkeypatch):
    from tiny_models import checkpoint_activations

    config = settings(tmp_path, loss_type="ipo", tokens_per_part=80, gradient_checkpointing=True)
    _, expected, _ = naive_step(config)
    model = tiny_model(dtype=torch.float64)
    trainer = DPO(model, PAIRS, config=config, reference=other_model(), tokenizer=tiny_tokenizer())
    checkpoint_activations(model)
    list(trainer.steps())
    found = {n.removeprefix("exp_avg/"): 10 * t for n, t in trainer.optimizer.tensors().items() if "exp_avg/" in n}
    assert difference(found, expected) < 1e-9
