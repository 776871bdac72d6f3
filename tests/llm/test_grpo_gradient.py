"""One step of GRPO against the same algorithm written as plain loops over full forward passes, in float64."""

import copy
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tiny_policy import KeepFloat64, tiny_model, tiny_tokenizer

from taurl.llm.algorithms import online as online_module
from taurl.llm.algorithms.grpo import GRPO
from taurl.llm.algorithms.grpo_config import GRPOConfig
from taurl.runtime.errors import InputError

PROMPTS = ["1+1?", "what is 2+3?", "5+5?", "a b c d e f?", "9?"]
GROUP = 4
# What the reward function gives, by prompt: None does not apply, the third group has no variance, the fourth no reward.
REWARDS = [[1.0, 0.0, 0.0, 0.5], [None, 2.0, -1.0, None], [0.3, 0.3, 0.3, 0.3], [None] * 4, [0.0, 0.0, 1.0, None]]
# Draws of a given seed end with these often enough for completions of different lengths.
STOP = ("a", "e", "3", "k", ".", "x", "5", "t")


@pytest.fixture(autouse=True)
def float64():
    with KeepFloat64():
        yield


@dataclass
class Sampled:
    """What the naive implementation is given: the very tokens that were trained on."""

    prompts: list[list[int]]
    completions: list  # [P][G]


class Mismatched:
    """A sampler whose probabilities are not quite the trainer's; with `copies` a group's last answer is its first."""

    copies = False

    def __init__(self, generator):
        self.generator, self.groups = generator, []

    def generate(self, prompts, *arguments, **keywords):
        shift = [0.3, -1.2, 0.05, 0.0, -0.4, 0.7]
        self.prompts, self.groups = prompts, []
        for group in self.generator.generate(prompts, *arguments, **keywords):
            # float32 values, as they are kept
            moved = [[float(np.float32(p + s)) for p, s in zip(c.logprobs, shift, strict=False)] for c in group]
            self.groups.append([replace(c, logprobs=p) for c, p in zip(group, moved, strict=True)])
            if self.copies:
                self.groups[-1][-1] = self.groups[-1][0]
        return self.groups

    def release(self):
        self.generator.release()


def settings(tmp_path, **changes):
    values = {
        "out": tmp_path / "run",
        "steps": 1,
        "prompts_per_step": len(PROMPTS),
        "group_size": GROUP,
        "max_tokens": 6,
        "eval_rows": 0,
        "stop": STOP,
        "threads": 1,
        "max_grad_norm": 1e9,
        "learning_rate": 1e-3,
        "temperature": 0.8,
        "tokens_per_part": 10_000,
    }
    return GRPOConfig(**(values | changes))


def reward(prompts, completions, **kwargs):
    places = [PROMPTS.index(prompt) for prompt in prompts]
    return [REWARDS[place][index % GROUP] for index, place in enumerate(places)]


def step(config, *, reward=reward, monkeypatch=None):
    """The record of one step, the trainer after it, what was sampled, and how many parts went through the model."""
    model = tiny_model(dtype=torch.float64)
    trainer = GRPO(model, [{"prompt": p} for p in PROMPTS], reward, config, tokenizer=tiny_tokenizer())
    trainer.generator = Mismatched(trainer.generator)
    if config.kl_coefficient:
        with trainer.policy.reference() as reference:
            move(reference)
    forwards = []
    real = online_module.completion_logprobs
    if monkeypatch:
        monkeypatch.setattr(
            online_module,
            "completion_logprobs",
            lambda *a, **k: (forwards.append(torch.is_grad_enabled()), real(*a, **k))[1],
        )
    (record,) = trainer.steps()
    return record, trainer, in_order(trainer.generator.prompts, trainer.generator.groups), sum(forwards)


def in_order(prompts, groups):
    """What was sampled, in the order of PROMPTS; a step takes them in an order of its own."""
    tokenizer = tiny_tokenizer()
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ids = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
    assert sorted(ids) == sorted(prompts)
    assert ids != prompts
    return Sampled(ids, [groups[prompts.index(prompt)] for prompt in ids])


def move(model):
    """Other weights, so that a KL term has a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def gradient(trainer):
    """The gradient of a single update: AdamW's first moment after one step is a tenth of it."""
    tensors = trainer.optimizer.tensors()
    return {name.removeprefix("exp_avg/"): 10 * t for name, t in tensors.items() if name.startswith("exp_avg/")}


def difference(one, other):
    """Norm of the difference between two dictionaries of tensors, relative to the second."""
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return math.sqrt(apart / sum(float(tensor.square().sum()) for tensor in other.values()))


# --- the algorithm again, as loops


def naive_advantages(rewards, how):
    everything = [r for group in rewards for r in group if r is not None]
    advantages = []
    for group in rewards:
        known = [r for r in group if r is not None]
        for r in group:
            if r is None or len(set(known)) < 2:
                advantages.append(0.0)
                continue
            spread = {"group": known, "batch": everything}.get(how)
            alone = statistics.fmean(known) if how == "mean" else 1.0
            scale = alone if spread is None else statistics.stdev(spread) + 1e-4
            advantages.append((r - statistics.fmean(known)) / scale)
    return advantages


def naive_tokens(model, prompt, tokens, temperature):
    """Log-probability and entropy of each token, from one full forward pass of one sequence."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1] / temperature
    log_probabilities = logits - logits.exp().sum(-1, keepdim=True).log()
    chosen = [log_probabilities[i, token] for i, token in enumerate(tokens)]
    entropies = [-(row.exp() * row).sum() for row in log_probabilities]
    return chosen, entropies


AGGREGATION = {
    "grpo": "sequence",
    "dr_grpo": "constant",
    "dapo": "token",
    "bnpo": "token",
    "cispo": "token",
    "sapo": "sequence",
    "luspo": "sum",
    "vespo": "token",
}


def naive_kl(estimator, x):
    e = math.exp(-x) if isinstance(x, float) else torch.exp(-x)
    return {"k1": x, "k2": x * x / 2, "k3": e - 1 + x}[estimator]


def naive_ratio(config, t, logprobs, before):
    if config.ratio_level == "sequence" or (config.ratio_level is None and config.loss_type == "luspo"):
        return torch.exp(sum(p - b for p, b in zip(logprobs, before, strict=True)) / len(logprobs))
    return torch.exp(logprobs[t] - before[t])


def naive_importance(config, t, before, sampler):
    """What a token's loss is multiplied with because it was sampled by `sampler` and not by `before`."""
    if config.importance_cap is None:
        return 1.0
    apart = [float(b) - s for b, s in zip(before, sampler, strict=True)]
    weight = math.exp(apart[t] if config.importance_mode.startswith("token") else sum(apart))
    truncates = config.importance_mode.endswith("truncate")
    return weight if weight <= config.importance_cap else config.importance_cap if truncates else 0.0


def naive_surrogate(config, t, logprobs, before, sampler, advantage):
    """The loss of token t, sampled by `sampler` and seen by `before` at the beginning of the step."""
    if config.loss_type == "vespo":
        weight = math.exp(sum(float(p) - s for p, s in zip(logprobs, sampler, strict=True)))
        power, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        return -(weight**power) * math.exp(decay * (1 - weight)) * advantage * logprobs[t]
    ratio = naive_ratio(config, t, logprobs, before)
    if config.loss_type == "cispo":
        loss = -min(float(ratio), 1 + (4 if config.clip_high is None else config.clip_high)) * advantage * logprobs[t]
    elif config.loss_type == "sapo":
        temperature = 1.0 if advantage > 0 else 1.05
        loss = -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantage
    else:
        loss = -min(ratio * advantage, min(max(ratio, 1 - config.clip_low), 1 + (config.clip_high or 0.2)) * advantage)
    return loss * naive_importance(config, t, before, sampler)


def naive_loss(model, reference, old, sampled, advantages, counted, config, figures=None):
    """The loss of the whole batch. `old` is None on a first update. What is logged of each token goes to `figures`."""
    rows = [(p, c) for p, group in zip(sampled.prompts, sampled.completions, strict=True) for c in group]
    token_count = sum(len(c.tokens) for (_, c), count in zip(rows, counted, strict=True) if count)
    total = torch.zeros((), dtype=torch.float64)
    for row, (prompt, completion) in enumerate(rows):
        if not counted[row]:
            continue
        logprobs, entropies = naive_tokens(model, prompt, completion.tokens, config.temperature)
        before = [p.detach() for p in logprobs] if old is None else old[row]
        if config.kl_coefficient:
            with torch.no_grad():
                base, _ = naive_tokens(reference, prompt, completion.tokens, config.temperature)
        length = len(logprobs)
        for t in range(length):
            advantage = advantages[row]
            if figures is not None and (advantage or config.kl_coefficient):  # else the token is not forwarded
                ratio = float(naive_ratio(config, t, logprobs, before))
                figures["clip_ratio/low_mean"].append(advantage < 0 and ratio < 1 - config.clip_low)
                figures["clip_ratio/high_mean"].append(advantage > 0 and ratio > 1 + (config.clip_high or 0.2))
                figures["entropy"].append(float(entropies[t]))
                if config.kl_coefficient:
                    figures["kl"].append(naive_kl("k3", float(logprobs[t] - base[t])))
            if config.kl_coefficient and config.kl_place == "reward":
                x = [float(p - b) for p, b in zip(logprobs, base, strict=True)]
                after = [naive_kl(config.kl_estimator, x[s]) for s in range(t, length)]
                whole = naive_kl(config.kl_estimator, sum(x))
                advantage -= config.kl_coefficient * (sum(after) if config.kl_level == "token" else whole)
            loss = naive_surrogate(config, t, logprobs, before, completion.logprobs, advantage)
            if config.kl_coefficient and config.kl_place != "reward":
                apart = [p - b for p, b in zip(logprobs, base, strict=True)]
                if config.kl_level == "token":
                    estimate, upto = naive_kl(config.kl_estimator, apart[t]), t + 1
                else:
                    estimate, upto = naive_kl(config.kl_estimator, sum(apart)) / length, length
                if config.kl_place == "weighted_loss":
                    weight = torch.exp(sum(logprobs[s] - before[s] for s in range(upto)))
                    estimate = estimate * (weight.detach() if config.kl_estimator == "k2" else weight)
                loss = loss + config.kl_coefficient * estimate
            loss = loss - config.entropy_coefficient * entropies[t]
            share = {
                "token": 1 / token_count,
                "sequence": 1 / (sum(counted) * length),
                "sum": 1 / sum(counted),
                "constant": 1 / (sum(counted) * config.max_tokens),
            }
            total = total + loss * share[AGGREGATION[config.loss_type]]
    return total


def naive_step(sampled, config, rewards=REWARDS, figures=None):
    """Losses of the updates, the last gradient, and the weights after one step on this sample."""
    model = tiny_model(dtype=torch.float64).eval()
    reference = copy.deepcopy(model)
    move(reference)
    advantages = naive_advantages(rewards, config.scale_rewards)
    counted = [r is not None for group in rewards for r in group]
    if config.mask_truncated:
        ended = [c.finish == "stop" for group in sampled.completions for c in group]
        counted = [a and b for a, b in zip(counted, ended, strict=True)]
    old = None
    if config.epochs > 1:
        pairs = [(p, c) for p, group in zip(sampled.prompts, sampled.completions, strict=True) for c in group]
        with torch.no_grad():
            old = [naive_tokens(model, p, c.tokens, config.temperature)[0] for p, c in pairs]
    adam = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(config.epochs):
        adam.zero_grad()
        loss = naive_loss(model, reference, old, sampled, advantages, counted, config, figures)
        loss.backward()
        losses.append(float(loss))
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        adam.step()
    return losses, grads, dict(model.named_parameters())


# --- tests


KL = {"kl_coefficient": 0.3}
ALL_CUTS = {"loss_type": "grpo", **KL}, {"loss_type": "dr_grpo"}  # of the others, whose rows do not mix either, one


@pytest.mark.parametrize(
    "terms",
    [
        *[{"loss_type": loss_type, **({} if i % 2 else KL)} for i, loss_type in enumerate(AGGREGATION)],
        {"loss_type": "grpo", "ratio_level": "sequence"},
        {"loss_type": "dr_grpo", "ratio_level": "sequence", **KL, "entropy_coefficient": 0.1},
        {"entropy_coefficient": 0.1},
    ],
    ids=lambda terms: "-".join(map(str, terms.values())),
)
def test_the_gradient_is_that_of_plain_loops_however_it_is_cut(tmp_path, monkeypatch, terms):
    config = settings(tmp_path, **terms)
    record, trainer, sampled, parts = step(config, monkeypatch=monkeypatch)
    assert parts == 1
    lengths = {len(c.tokens) for group in sampled.completions for c in group}
    assert len(lengths) > 2
    losses, expected, _ = naive_step(sampled, config)
    assert record["loss"] == pytest.approx(losses[0], rel=1e-9)
    whole = gradient(trainer)
    assert difference(whole, expected) < 1e-9
    seen = {parts}
    cuts = (120, 60, 20) if terms in ALL_CUTS else (20,)
    for tokens in cuts:
        cut = settings(tmp_path / str(tokens), **terms, tokens_per_part=tokens)
        record_cut, trainer_cut, _, parts = step(cut, monkeypatch=monkeypatch)
        seen.add(parts)
        assert record_cut["loss"] == pytest.approx(record["loss"], rel=1e-9)
        assert difference(gradient(trainer_cut), whole) < 1e-9
        for name in ("entropy", "sampling/logp_difference_mean"):
            assert record_cut[name] == pytest.approx(record[name], rel=1e-9)
    assert len(seen) >= len(cuts)
    assert max(seen) >= 6


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("place", ["reward", "loss", "weighted_loss"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_each_estimator_of_the_divergence_in_each_place(tmp_path, estimator, place, level):
    divergence = {"kl_estimator": estimator, "kl_place": place, "kl_level": level, "kl_coefficient": 0.3}
    config = settings(tmp_path, loss_type="dr_grpo", **divergence, tokens_per_part=60)
    record, trainer, sampled, _ = step(config)
    figures = defaultdict(list)
    losses, expected, _ = naive_step(sampled, config, figures=figures)
    assert record["loss"] == pytest.approx(losses[0], rel=1e-9)
    assert difference(gradient(trainer), expected) < 1e-9
    assert record["kl"] == pytest.approx(statistics.fmean(figures["kl"]), rel=1e-9)
    assert record["entropy"] == pytest.approx(statistics.fmean(figures["entropy"]), rel=1e-9)


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_scales_of_the_rewards(tmp_path, scale):
    config = settings(tmp_path, scale_rewards=scale)
    record, trainer, sampled, _ = step(config)
    losses, expected, _ = naive_step(sampled, config)
    assert record["loss"] == pytest.approx(losses[0], rel=1e-9)
    assert difference(gradient(trainer), expected) < 1e-9


@pytest.mark.parametrize("tokens", [10_000, 20])
@pytest.mark.parametrize(
    "terms", [{**KL, "entropy_coefficient": 0.1}, {"loss_type": "grpo", "ratio_level": "sequence"}]
)
def test_answers_that_are_equal_count_as_often_as_they_were_given(tmp_path, monkeypatch, terms, tokens):
    monkeypatch.setattr(Mismatched, "copies", True)
    config = settings(tmp_path, **terms, tokens_per_part=tokens)
    record, trainer, sampled, _ = step(config)
    assert all(group[0].tokens == group[-1].tokens for group in sampled.completions)
    losses, expected, _ = naive_step(sampled, config)
    assert record["loss"] == pytest.approx(losses[0], rel=1e-9)
    assert difference(gradient(trainer), expected) < 1e-9


def test_rewards_over_their_mean(tmp_path):
    """As the others, of rewards that are not negative; one that is is named."""
    config = settings(tmp_path, scale_rewards="mean")
    positive = [[r if r is None else abs(r) for r in group] for group in REWARDS]
    record, trainer, sampled, _ = step(
        config, reward=lambda **given: [r if r is None else abs(r) for r in reward(**given)]
    )
    losses, expected, _ = naive_step(sampled, config, rewards=positive)
    assert record["loss"] == pytest.approx(losses[0], rel=1e-9)
    assert difference(gradient(trainer), expected) < 1e-9
    with pytest.raises(
        InputError, match=r"in step 1 a completion of 'what is 2.3.' has the reward -1, expected 0 or more"
    ):
        step(settings(tmp_path / "negative", scale_rewards="mean"))


@pytest.mark.parametrize("importance_cap", [None, 1.1])
def test_the_mismatch_with_the_sampler_is_weighed_up_to_the_cap(tmp_path, importance_cap):
    config = settings(tmp_path, importance_cap=importance_cap)
    record, trainer, sampled, _ = step(config)
    _, expected, _ = naive_step(sampled, config)
    assert difference(gradient(trainer), expected) < 1e-9
    _, other, _ = naive_step(sampled, settings(tmp_path, importance_cap=2.0))
    assert difference(gradient(trainer), other) > 0.01
    # Its raw value is logged: the shifts of `Mismatched`, over the tokens of groups with a signal.
    shift = [0.3, 1.2, 0.05, 0.0, 0.4, 0.7]
    counted = [
        shift[: len(c.tokens)]
        for p in (0, 1, 4)
        for g, c in enumerate(sampled.completions[p])
        if REWARDS[p][g] is not None
    ]
    expected_mean = statistics.fmean(s for row in counted for s in row)
    assert record["sampling/logp_difference_mean"] == pytest.approx(expected_mean, rel=1e-6)


@pytest.mark.parametrize("mode", ["token_mask", "sequence_truncate", "sequence_mask"])
def test_other_ways_to_weigh_the_mismatch(tmp_path, mode):
    config = settings(tmp_path, importance_mode=mode, importance_cap=1.1, tokens_per_part=60)
    _, trainer, sampled, _ = step(config)
    _, expected, _ = naive_step(sampled, config)
    assert difference(gradient(trainer), expected) < 1e-9
    _, other, _ = naive_step(sampled, settings(tmp_path, importance_cap=1.1))
    assert difference(gradient(trainer), other) > 0.01


def test_truncated_completions_are_masked_by_option_and_keep_their_place_in_the_baseline(tmp_path):
    config = settings(tmp_path, mask_truncated=True, loss_type="grpo")
    record, trainer, sampled, _ = step(config)
    finishes = [c.finish for group in sampled.completions for c in group]
    assert {"stop", "length"} == set(finishes)
    assert record["completions/clipped_ratio"] == finishes.count("length") / len(finishes)
    losses, expected, _ = naive_step(sampled, config)
    assert record["loss"] == pytest.approx(losses[0], rel=1e-9)
    assert difference(gradient(trainer), expected) < 1e-9
    _, unmasked, _ = naive_step(sampled, config.model_copy(update={"mask_truncated": False}))
    assert difference(gradient(trainer), unmasked) > 0.01


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_several_updates_use_the_log_probabilities_from_before_the_first(tmp_path, ratio):
    config = settings(
        tmp_path, epochs=3, ratio_level=ratio, learning_rate=0.02, clip_low=0.1, clip_high=0.15, tokens_per_part=60
    )
    record, trainer, sampled, _ = step(config)
    figures = defaultdict(list)
    losses, _, weights = naive_step(sampled, config, figures=figures)
    assert record["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-8)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "entropy"):
        assert record[name] == pytest.approx(statistics.fmean(figures[name]), rel=1e-8)
    assert 0 < record["clip_ratio/low_mean"] != record["clip_ratio/high_mean"] > 0
    assert difference(dict(trainer.policy.model.named_parameters()), weights) < 1e-9


@pytest.mark.parametrize(
    ("minibatches", "others", "loss_type"),
    [(1, 0, "dapo"), (5, 4, "dapo"), (5, 0, "vespo")],  # the last weighs against the sampler's
)
def test_the_first_minibatch_needs_no_pass_of_its_own(tmp_path, monkeypatch, minibatches, others, loss_type):
    """Prompts forwarded without gradient, and log-probabilities from before the first update all the same."""
    forwarded, rollouts = [], []
    real, update = GRPO.forward, GRPO._update

    def spy(self, rollout, part, model):
        forwarded.extend(tuple(prompt) for prompt in part.prompts if not torch.is_grad_enabled())
        return real(self, rollout, part, model)

    def keep(self, rollout, *arguments):
        rollouts.append(rollout)
        return update(self, rollout, *arguments)

    monkeypatch.setattr(GRPO, "forward", spy)
    monkeypatch.setattr(GRPO, "_update", keep)
    every = {
        "loss_type": loss_type,
        "entropy_coefficient": 0.1,
    }  # without it, groups without a signal would not be forwarded
    config = settings(tmp_path, epochs=2, minibatches=minibatches, learning_rate=0.02, tokens_per_part=60, **every)
    step(config, reward=lambda prompts, **_: [float(place % GROUP) for place in range(len(prompts))])
    assert len(set(forwarded)) == others
    if loss_type == "vespo":
        return
    untouched, (rollout,) = tiny_model(dtype=torch.float64), rollouts
    for row, completion in enumerate(rollout.completions):
        expected, _ = naive_tokens(untouched, rollout.prompts[row // GROUP], completion.tokens, config.temperature)
        found = rollout.old_logprobs[row, : len(expected)]
        assert float((found - torch.stack(expected)).abs().max()) < 1e-9


def test_every_minibatch_is_an_update_of_its_own_mean(tmp_path, monkeypatch):
    """The weights of its tokens sum to 1, whatever the other minibatches hold."""
    sums, real = defaultdict(float), GRPO._loss

    def noted(self, rollout, part, weights, tally):
        sums[len(tally.updates)] += float(weights.sum())
        return real(self, rollout, part, weights, tally)

    monkeypatch.setattr(GRPO, "_loss", noted)
    config = settings(tmp_path, minibatches=5, tokens_per_part=60)
    step(config, reward=lambda prompts, **_: [float(place % GROUP) for place in range(len(prompts))])
    assert list(sums.values()) == pytest.approx([1.0] * 5)


def test_the_ratio_may_be_taken_to_the_sampler_without_any_other_pass(tmp_path):
    config = settings(tmp_path, old_logprobs="sampler", clip_low=0.3, clip_high=0.4)
    record, trainer, sampled, _ = step(config)
    old = [completion.logprobs for group in sampled.completions for completion in group]
    model = tiny_model(dtype=torch.float64)
    counted = [r is not None for group in REWARDS for r in group]
    loss = naive_loss(model, None, old, sampled, naive_advantages(REWARDS, "group"), counted, config)
    loss.backward()
    assert record["loss"] == pytest.approx(float(loss), rel=1e-9)
    assert difference(gradient(trainer), {name: p.grad for name, p in model.named_parameters()}) < 1e-9
    assert record["clip_ratio/low_mean"] > 0  # the shifts of `Mismatched`: ratios are not 1
    assert record["sampling/logp_difference_mean"] > 0.1


def test_on_a_single_update_nothing_is_clipped_and_the_ratio_is_one(tmp_path):
    """However tight the clip: the loss is then −Σ weight · advantage, without any ratio in it."""
    config = settings(tmp_path, clip_low=0.0, clip_high=0.0, importance_cap=None)
    record, _, sampled, _ = step(config)
    assert record["clip_ratio/low_mean"] == record["clip_ratio/high_mean"] == 0
    advantages = iter(naive_advantages(REWARDS, "group"))
    rows = [
        (next(advantages), len(c.tokens), r)
        for group, rewards in zip(sampled.completions, REWARDS, strict=True)
        for c, r in zip(group, rewards, strict=True)
    ]
    count = sum(length for _, length, r in rows if r is not None)
    assert record["loss"] == pytest.approx(-sum(a * n for a, n, r in rows if r is not None) / count, rel=1e-12)


def test_a_step_without_any_signal_moves_by_momentum_as_zeros_would(tmp_path):
    """Skipping every group is the same as computing a gradient of zero."""

    def second_step_flat(prompts, trainer_state, **kwargs):
        return reward(prompts, None) if trainer_state.global_step == 0 else [1.0] * len(prompts)

    config = settings(tmp_path, steps=2)
    model = tiny_model(dtype=torch.float64)
    trainer = GRPO(model, [{"prompt": p} for p in PROMPTS], second_step_flat, config, tokenizer=tiny_tokenizer())
    steps = trainer.steps()
    next(steps)
    before = {name: t.clone() for name, t in trainer.optimizer.tensors().items()}
    record = next(steps)
    after = trainer.optimizer.tensors()
    assert record["frac_reward_zero_std"] == 1
    assert any(name.startswith("exp_avg/") for name in before)
    assert record["loss"] == record["grad_norm"] == 0
    for name, tensor in before.items():
        if name.startswith("exp_avg/"):
            torch.testing.assert_close(after[name], 0.9 * tensor, rtol=1e-12, atol=0)


def test_the_tokens_trained_on_are_the_ids_that_were_sampled(tmp_path, monkeypatch):
    """Special tokens and unknown characters would not survive being decoded and encoded again."""
    trained, scored = {}, []
    real = online_module.completion_logprobs

    def spy(model, prompts, prompt_of, tokens, mask, **keywords):
        for place, row, kept in zip(prompt_of.tolist(), tokens, mask, strict=True):
            trained.setdefault(tuple(prompts[place]), []).append(row[kept].tolist())
        return real(model, prompts, prompt_of, tokens, mask, **keywords)

    def keep(prompts, completion_ids, **kwargs):
        scored.extend(completion_ids)
        return [float(i) for i in range(len(prompts))]

    monkeypatch.setattr(online_module, "completion_logprobs", spy)
    _, _, sampled, _ = step(settings(tmp_path, tokens_per_part=50, stop=()), reward=keep)
    expected = {
        tuple(prompt): [c.tokens for c in group]
        for prompt, group in zip(sampled.prompts, sampled.completions, strict=True)
    }
    assert {prompt: sorted(rows) for prompt, rows in trained.items()} == {p: sorted(r) for p, r in expected.items()}
    assert sorted(scored) == sorted(tokens for rows in expected.values() for tokens in rows)
    assert any(token < 5 for tokens in scored for token in tokens[:-1])  # special tokens in the middle
