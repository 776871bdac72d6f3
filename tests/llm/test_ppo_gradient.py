"""One step of PPO against the same algorithm written as plain loops over full forward passes, in float64."""

import itertools
import math
import statistics
from collections import defaultdict

import pytest
import torch
from test_grpo_gradient import Mismatched, difference, move, naive_importance, naive_kl, naive_tokens
from tiny_policy import KeepFloat64, tiny_model, tiny_tokenizer

from taurl.functional.advantages import group_relative
from taurl.functional.returns import generalized_advantage
from taurl.llm import GRPO, PPO, GRPOConfig, PPOConfig
from taurl.llm.algorithms import ppo as ppo_module
from taurl.llm.generation import Completion
from taurl.llm.scoring.prefix_tree import PrefixTree

PROMPTS = ["1+1?", "what is 2+3?", "5+5?", "a b c d e f?"]
GROUP = 2
SCORES = [[1.0, 0.0], [None, 2.0], [-1.0, 0.3], [0.5, 0.5]]  # None: no reward applies
STOP = ("a", "e", "3", "k", ".", "x", "5", "t")


@pytest.fixture(autouse=True)
def float64():
    with KeepFloat64():
        yield


def reward(prompts, completions, **kwargs):
    places = [PROMPTS.index(prompt) for prompt in prompts]
    return [SCORES[place][index % GROUP] for index, place in enumerate(places)]


def settings(tmp_path, **changes):
    values = {
        "out": tmp_path / "run",
        "steps": 1,
        "prompts_per_step": len(PROMPTS),
        "group_size": GROUP,
        "epochs": 1,
        "max_tokens": 5,
        "eval_rows": 0,
        "stop": STOP,
        "threads": 1,
        "max_grad_norm": 1e9,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "temperature": 0.8,
        "tokens_per_part": 10_000,
        "kl_coefficient": 0.3,
        "discount": 0.9,
        "trace_decay": 0.8,
        "truncated": "bootstrap",
    }
    return PPOConfig(**(values | changes))


class Kept:
    """A trainer about to take its step, every part of it moved away from zero, with what it samples."""

    def __init__(self, config, reward=reward):
        rows = [{"prompt": prompt} for prompt in PROMPTS]
        model = tiny_model(dtype=torch.float64)
        self.trainer = trainer = PPO(model, rows, reward, config, tokenizer=tiny_tokenizer())
        self.config = config
        trainer.generator = self.generator = Mismatched(trainer.generator)
        generator = torch.Generator().manual_seed(3)

        def shaken(tensor):
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

        if config.lora_rank:
            for name, weight in trainer.policy.model.named_parameters():
                if "lora_" in name:
                    shaken(weight)
        elif config.kl_coefficient:
            with trainer.policy.reference() as reference:
                move(reference)
        if trainer.critic:
            for _, weight in trainer.critic.named_parameters():
                shaken(weight)

    def take(self):
        (self.record,) = self.trainer.steps()
        return self

    def gradient(self, optimizer):
        """AdamW's first moment after one step is a tenth of the gradient."""
        tensors = getattr(self.trainer, optimizer).tensors()
        return {name.removeprefix("exp_avg/"): 10 * t for name, t in tensors.items() if name.startswith("exp_avg/")}

    def rows(self):
        """(prompt ids, completion, score) in the order of the rollout."""
        order = [
            next(i for i, text in enumerate(PROMPTS) if tiny_tokenizer().decode(ids).startswith(f"<user>{text}<end>"))
            for ids in self.generator.prompts
        ]
        return [
            (ids, completion, SCORES[place][index])
            for place, ids, group in zip(order, self.generator.prompts, self.generator.groups, strict=True)
            for index, completion in enumerate(group)
        ]


# --- the algorithm again, as loops


class NaiveModels:
    """Forward passes of one sequence under actor, reference and critic."""

    def __init__(self, kept):
        self.trainer, self.config = kept.trainer, kept.config

    def actor(self, prompt, tokens):
        return naive_tokens(self.trainer.policy.model, prompt, tokens, self.config.temperature)

    def reference(self, prompt, tokens):
        with self.trainer.policy.reference() as model, torch.no_grad():
            return [float(p) for p in naive_tokens(model, prompt, tokens, self.config.temperature)[0]]

    def values(self, prompt, tokens):
        """V before each token and after the last: L + 1 of them."""
        if not self.trainer.critic:
            return torch.zeros(len(tokens) + 1, dtype=torch.float64)
        ids = torch.tensor([[*prompt, *tokens]])
        with self.trainer.critic.trunk() as model:
            if hasattr(model, "get_base_model"):
                model = model.get_base_model()
            hidden = getattr(model, "model", model)(ids).last_hidden_state[0, len(prompt) - 1 :]
        head = self.trainer.critic.head
        return (hidden * head.weight[0]).sum(-1) + head.bias


def naive_estimates(models, rows, config):
    """For each row that counts: index, rewards, values, advantages and returns by token, as lists."""
    found = []
    for index, (prompt, completion, score) in enumerate(rows):
        cut = completion.finish == "length"
        if score is None or (cut and config.truncated == "mask"):
            continue
        with torch.no_grad():
            logprobs = [float(p) for p in models.actor(prompt, completion.tokens)[0]]
            values = models.values(prompt, completion.tokens).tolist()
        rewards = [0.0] * len(logprobs)
        if config.kl_coefficient and config.kl_place == "reward":
            base = models.reference(prompt, completion.tokens)
            logprobs = completion.logprobs if config.old_logprobs == "sampler" else logprobs
            rewards = [
                -config.kl_coefficient * naive_kl(config.kl_estimator, p - b)
                for p, b in zip(logprobs, base, strict=True)
            ]
        if config.reward_clip:
            score = max(-config.reward_clip, min(config.reward_clip, score))
        if cut and config.truncated == "penalty":
            score -= config.missing_eos_penalty
        bootstraps = cut and config.truncated == "bootstrap"
        rewards[-1] += 0.0 if bootstraps else score
        following = [*values[1:-1], values[-1] if bootstraps else 0.0]
        advantages, after = [0.0] * len(rewards), 0.0
        for t in reversed(range(len(rewards))):
            error = rewards[t] + config.discount * following[t] - values[t]
            advantages[t] = after = error + config.discount * config.trace_decay * after
        returns = [a + v for a, v in zip(advantages, values[:-1], strict=True)]
        found.append((index, rewards, values[:-1], advantages, returns))
    if config.whiten == "batch":
        everything = [a for row in found for a in row[3]]
        mean, deviation = statistics.fmean(everything), statistics.stdev(everything) + 1e-4
        found = [(i, r, v, [(a - mean) / deviation for a in advantages], g) for i, r, v, advantages, g in found]
    return found


def naive_figures(models, rows, estimates, config):
    """What is logged of a step before its updates."""
    values, returns = ([number for row in estimates for number in row[place]] for place in (2, 4))
    figures = {"value/mean": statistics.fmean(values)}
    errors = [target - value for target, value in zip(returns, values, strict=True)]
    figures["value/explained_variance"] = 1 - statistics.pvariance(errors) / statistics.pvariance(returns)
    if not models.trainer.critic:
        figures = {}
    if config.kl_coefficient:
        apart = []
        for index, *_ in estimates:
            prompt, completion, _ = rows[index]
            logprobs = [float(p) for p in models.actor(prompt, completion.tokens)[0]]
            logprobs = completion.logprobs if config.old_logprobs == "sampler" else logprobs
            apart += [p - b for p, b in zip(logprobs, models.reference(prompt, completion.tokens), strict=True)]
        figures["kl"] = statistics.fmean(naive_kl("k3", x) for x in apart)
        figures["kl_per_completion"] = sum(apart) / len(estimates)
        if config.kl_place == "reward":
            prices = [config.kl_coefficient * naive_kl(config.kl_estimator, x) for x in apart]
            figures["reward/kl_penalty"] = sum(prices) / len(estimates)
    return figures


def naive_losses(models, rows, estimates, old, config, figures=None):
    """Policy loss and value loss of the whole batch. `old` is None on a first update.

    What is logged of each token goes to `figures`.
    """
    count = sum(len(rewards) for _, rewards, *_ in estimates)
    policy_loss, value_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for index, _, old_values, advantages, returns in estimates:
        prompt, completion, _ = rows[index]
        logprobs, entropies = models.actor(prompt, completion.tokens)
        values = models.values(prompt, completion.tokens)
        befores = [float(p) for p in logprobs] if old is None else old[index]
        befores = completion.logprobs if config.old_logprobs == "sampler" else befores
        for t, logprob in enumerate(logprobs):
            ratio = torch.exp(logprob - befores[t])
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            loss = -min(ratio * advantages[t], clipped * advantages[t])
            loss = loss * naive_importance(config, t, befores, completion.logprobs)
            if config.kl_place == "loss":
                x = logprob - models.reference(prompt, completion.tokens)[t]
                loss = loss + config.kl_coefficient * naive_kl(config.kl_estimator, x)
            policy_loss = policy_loss + (loss - config.entropy_coefficient * entropies[t]) / count
            error = (values[t] - returns[t]) ** 2
            if config.value_clip is not None:
                near = old_values[t] + min(max(values[t] - old_values[t], -config.value_clip), config.value_clip)
                error = max(error, (near - returns[t]) ** 2)
            value_loss = value_loss + 0.5 * error / count
            if figures is not None:
                figures["clip_ratio/low_mean"].append(advantages[t] < 0 and float(ratio) < 1 - config.clip_low)
                figures["clip_ratio/high_mean"].append(advantages[t] > 0 and float(ratio) > 1 + config.clip_high)
                figures["value/clip_ratio"].append(float((values[t] - old_values[t]).abs()) > config.value_clip)
                figures["value/loss"].append(0.5 * float(error))
                figures["entropy"].append(float(entropies[t]))
                figures["approx_kl"].append(naive_kl("k3", befores[t] - float(logprob)))
    return policy_loss, value_loss


def naive_gradients(kept):
    """Gradients of the policy's and the critic's weights by name, computed before the trainer steps."""
    models, rows, config, trainer = NaiveModels(kept), kept.rows(), kept.config, kept.trainer
    estimates = naive_estimates(models, rows, config)
    policy_loss, value_loss = naive_losses(models, rows, estimates, None, config)
    shares = trainer.critic is not None and trainer.critic.shares_trunk
    total = policy_loss + (config.value_coefficient if shares else 1.0) * value_loss
    named = {"optimizer": trainer.optimizer.parameters}
    if trainer.critic:
        named["critic_optimizer"] = trainer.critic_optimizer.parameters
    found = {}
    for optimizer, weights in named.items():
        gradients = torch.autograd.grad(total, list(weights.values()), retain_graph=True, allow_unused=True)
        found[optimizer] = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    return found, float(policy_loss), float(value_loss), naive_figures(models, rows, estimates, config)


def compared(tmp_path, cuts, finishes=("length", "stop"), **changes):
    """The step's gradients and figures must be those of the loops, whole and cut into parts."""
    config = settings(tmp_path, **changes)
    rehearsal = Kept(config)
    prompts = rehearsal.trainer.prompts.take(rehearsal.trainer.order.take(0, len(PROMPTS))).ids
    rehearsal.trainer.sample(prompts, GROUP, 1)  # the same draws as in the step
    expected, policy_loss, value_loss, figures = naive_gradients(rehearsal)
    for tokens in cuts:
        out = tmp_path / f"parts{tokens}"
        kept = Kept(config.model_copy(update={"tokens_per_part": tokens, "out": out})).take()
        assert [c.tokens for _, c, _ in kept.rows()] == [c.tokens for _, c, _ in rehearsal.rows()]
        for optimizer, gradients in expected.items():
            assert difference(kept.gradient(optimizer), gradients) < 1e-9, optimizer
        for name, figure in figures.items():
            assert kept.record[name] == pytest.approx(figure, rel=1e-9), name
        if kept.trainer.critic:
            assert kept.record["value/loss"] == pytest.approx(value_loss, rel=1e-9)
        if not (kept.trainer.critic and kept.trainer.critic.shares_trunk):
            assert kept.record["loss"] == pytest.approx(policy_loss, rel=1e-9, abs=1e-12)
    assert sorted({c.finish for _, c, _ in rehearsal.rows()}) == list(finishes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic": "head", "entropy_coefficient": 0.1},
        {"critic": "none", "trace_decay": 1.0, "truncated": "penalty", "missing_eos_penalty": 0.7},
        {"critic": "copy", "lora_rank": 2, "lora_targets": ("q_proj", "down_proj")},
        {"critic": "head", "lora_rank": 2, "lora_targets": ("q_proj", "v_proj")},
        {"kl_place": "loss", "kl_estimator": "k2", "truncated": "mask"},
        {"kl_place": "loss", "kl_estimator": "k3", "whiten": "none", "value_clip": None},
        {"kl_estimator": "k3", "kl_coefficient": 0.1, "reward_clip": 0.6, "truncated": "penalty"},
        {"old_logprobs": "sampler", "clip_high": 5.0, "clip_low": 0.9},
        {"kl_coefficient": 0.0, "discount": 1.0, "trace_decay": 0.95, "importance_cap": 1.1},
        {"importance_mode": "sequence_mask", "importance_cap": 1.1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "defaults",
)
def test_the_gradient_is_that_of_plain_loops_however_it_is_cut(tmp_path, changes):
    every = changes in ({}, {"critic": "head", "entropy_coefficient": 0.1})  # in the others rows do not mix either
    compared(tmp_path, (10_000, 60, 20) if every else (10_000, 20), **changes)


@pytest.mark.parametrize("critic", ["copy", "head", "none"])
def test_answers_that_are_equal_count_as_often_as_they_were_given(tmp_path, monkeypatch, critic):
    monkeypatch.setattr(Mismatched, "copies", True)
    changes = {"trace_decay": 1.0, "truncated": "penalty"} if critic == "none" else {}
    compared(tmp_path, (10_000, 20), finishes=("stop",), critic=critic, **changes)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
def test_several_updates_of_policy_and_critic(tmp_path, kl_coefficient):
    """Old log-probabilities, old values and advantages are those of the step's beginning; both clips at work.

    Without a reference nothing but the first update's own forward pass gives the old log-probabilities.
    """
    config = settings(
        tmp_path,
        epochs=3,
        learning_rate=0.02,
        critic_learning_rate=0.02,
        clip_low=0.1,
        value_clip=0.05,
        stop=STOP[:4],
        kl_coefficient=kl_coefficient,
    )
    rehearsal = Kept(config)
    trainer = rehearsal.trainer
    trainer.sample(trainer.prompts.take(trainer.order.take(0, len(PROMPTS))).ids, GROUP, 1)
    models, rows = NaiveModels(rehearsal), rehearsal.rows()
    estimates = naive_estimates(models, rows, config)
    with torch.no_grad():
        old = [[float(p) for p in models.actor(prompt, c.tokens)[0]] for prompt, c, _ in rows]
    optimizers = [
        torch.optim.AdamW(o.parameters.values(), lr=0.02, weight_decay=0.0)
        for o in (trainer.optimizer, trainer.critic_optimizer)
    ]
    figures = defaultdict(list)
    for _ in range(config.epochs):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for loss in naive_losses(models, rows, estimates, old, config, figures):
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    kept = Kept(config.model_copy(update={"tokens_per_part": 60, "out": tmp_path / "trained"})).take()
    for name, numbers in figures.items():
        assert kept.record[name] == pytest.approx(statistics.fmean(numbers), rel=1e-7), name
    assert 0 < kept.record["clip_ratio/low_mean"] != kept.record["clip_ratio/high_mean"] > 0
    assert kept.record["value/clip_ratio"] > 0
    for optimizer in ("optimizer", "critic_optimizer"):
        expected = getattr(trainer, optimizer).parameters
        found = getattr(kept.trainer, optimizer).parameters
        assert (
            difference({k: v.detach() for k, v in found.items()}, {k: v.detach() for k, v in expected.items()}) < 1e-8
        )


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
def test_every_minibatch_is_compared_with_the_policy_that_sampled(tmp_path, monkeypatch, kl_coefficient):
    """The first one's old log-probabilities are those of its own forward pass, the others' of a pass before."""
    rate = 1e-14  # nothing moves
    changes = {"minibatches": 4, "learning_rate": rate, "critic_learning_rate": rate, "kl_coefficient": kl_coefficient}
    monkeypatch.setattr(PrefixTree, "of", None)  # rows before an update, as in it: a tree would round otherwise
    record = Kept(settings(tmp_path, **changes)).take().record
    assert abs(record["approx_kl"]) < 1e-12
    assert record["clip_ratio/low_mean"] == record["clip_ratio/high_mean"] == 0


class Letters:
    """Each turn earns what its letters are worth, and is answered until the third."""

    def __init__(self, seed):
        self.seed, self.turn = seed, 0

    def reset(self):
        return [{"role": "user", "content": f"say a{self.seed % 10}"}]

    def step(self, completion):
        self.turn += 1
        return [{"role": "user", "content": "and?"}], sum(map(ord, completion)) % 7 - 3.0, self.turn == 3


@pytest.mark.parametrize(("critic", "turns"), [("copy", 3), ("head", 2)])  # the episodes end, or are cut off
def test_over_several_turns_the_gradient_is_that_of_plain_loops(tmp_path, critic, turns):
    changes = {"critic": critic, "max_turns": turns, "whiten": "none", "value_clip": None, "max_tokens": 3, "stop": ()}
    changes |= {"importance_cap": None, "temperature": 1.0}
    config = settings(tmp_path, **changes, prompts_per_step=2, tokens_per_part=60)

    def begun(out):
        given = config.model_copy(update={"out": tmp_path / out})
        trainer = PPO(tiny_model(dtype=torch.float64), config=given, tokenizer=tiny_tokenizer(), environment=Letters)
        with trainer.policy.reference() as reference:
            move(reference)
        torch.nn.init.normal_(trainer.critic.head.weight, generator=torch.Generator().manual_seed(1))
        return trainer

    trainer = begun("rehearsal")
    collected = trainer._collect(next(iter(trainer.run.steps())))
    policy_loss, value_loss, count = 0.0, 0.0, 0
    for row, (prompt, completion) in enumerate(
        zip(collected.rollout.prompts, collected.rollout.completions, strict=True)
    ):
        ids = torch.tensor([[*prompt, *completion.tokens]])
        chosen = [place for place, own in enumerate(completion.chosen) if own]
        logprobs, _ = naive_tokens(trainer.policy.model, prompt, completion.tokens, 1.0)
        with torch.no_grad(), trainer.policy.reference() as model:
            base, _ = naive_tokens(model, prompt, completion.tokens, 1.0)
        with trainer.critic.trunk() as model:
            hidden = getattr(model, "model", model)(ids).last_hidden_state[0, len(prompt) - 1 :]
        values = (hidden * trainer.critic.head.weight[0]).sum(-1) + trainer.critic.head.bias
        cut = turns < 3
        after, following = 0.0, float(values[-1]) if cut else 0.0
        for place in reversed(chosen):
            price = config.kl_coefficient * float(logprobs[place] - base[place])
            earned = float(collected.rewards[row, place]) - price
            error = earned + config.discount * following - float(values[place])
            after = error + config.discount * config.trace_decay * after
            following = float(values[place])
            policy_loss = policy_loss - (logprobs[place] - logprobs[place].detach()).exp() * after
            value_loss = value_loss + 0.5 * (values[place] - (after + following)) ** 2
            count += 1
    total = (policy_loss + (config.value_coefficient if critic == "head" else 1.0) * value_loss) / count
    taken = begun("taken")
    (record,) = taken.steps()
    assert record["episodes/mean_turns"] == turns
    for optimizer in ("optimizer", "critic_optimizer"):
        weights = getattr(trainer, optimizer).parameters
        gradients = torch.autograd.grad(total, list(weights.values()), retain_graph=True, allow_unused=True)
        expected = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        tensors = getattr(taken, optimizer).tensors()
        assert difference({name: 10 * tensors[f"exp_avg/{name}"] for name in weights}, expected) < 1e-9, optimizer


# --- against the exact gradient, the control wing, and GRPO


class Everything:
    """A sampler that gives every completion of at most two tokens, in an order of its own."""

    def __init__(self, trainer, stop):
        self.trainer, self.stop, self.known = trainer, stop, {}

    def generate(self, prompts, count, sampling, **keywords):
        vocabulary = range(self.trainer.policy.model.config.vocab_size)
        rows = [[t] for t in vocabulary if t == self.stop]
        rows += [[t, u] for t, u in itertools.product(vocabulary, vocabulary) if t != self.stop]
        assert len(rows) == count
        self.rows, groups = rows, []
        for prompt in prompts:
            with torch.no_grad():
                exact = [self.logprobs(prompt, row) for row in rows]
            groups.append([Completion(r, p.tolist(), "stop") for r, p in zip(rows, exact, strict=True)])
        return groups

    def release(self):
        pass

    def tables(self, model, prompt):
        """Log-probabilities of the first token [V] and of the second after each first one [V, V]."""
        vocabulary = model.config.vocab_size
        ids = torch.tensor([[*prompt, first] for first in range(vocabulary)])
        logprobs = model(ids).logits[:, -2:].log_softmax(-1)
        return logprobs[0, 0], logprobs[:, 1]

    def logprobs(self, prompt, row):
        if tuple(prompt) not in self.known:
            self.known[tuple(prompt)] = self.tables(self.trainer.policy.model, prompt)
        first, second = self.known[tuple(prompt)]
        return torch.stack([first[row[0]], *(second[row[0], token] for token in row[1:])])


def bandit_reward(completion_ids, prompts, **kwargs):
    return [
        math.sin(ids[0] * (1 + len(p))) + 0.3 * math.cos(ids[-1] - ids[0])
        for ids, p in zip(completion_ids, prompts, strict=True)
    ]


@pytest.mark.parametrize(("critic", "beta"), [("none", 0.0), ("none", 0.2), ("copy", 0.0), ("head", 0.2)])
def test_on_a_text_bandit_the_gradient_is_the_exact_policy_gradient(tmp_path, monkeypatch, critic, beta):
    """Two states, all completions of up to two tokens, each weighed by its probability: E[Σ_t A_t ∇log π] = ∇J.

    Whatever the critic says: a baseline leaves the expectation as it is. J = E[r] − β KL(π ‖ π_ref).
    """
    vocabulary = 45
    config = settings(
        tmp_path,
        prompts_per_step=2,
        group_size=1 + (vocabulary - 1) * vocabulary,
        max_tokens=2,
        temperature=1.0,
        kl_coefficient=beta,
        discount=1.0,
        trace_decay=1.0,
        whiten="none",
        critic=critic,
        **({"value_coefficient": 1e-12} if critic == "head" else {}),
        truncated="penalty",
        importance_cap=None,
        stop=(),
        samples_per_step=0,
        tokens_per_part=100_000,
    )
    model = tiny_model(dtype=torch.float64)
    rows = [{"prompt": "1?"}, {"prompt": "what?"}]
    trainer = PPO(model, rows, bandit_reward, config, tokenizer=tiny_tokenizer())
    trainer.generator = everything = Everything(trainer, stop=1)
    reference = None
    if beta:
        with trainer.policy.reference() as reference:
            move(reference)
    if trainer.critic:
        torch.nn.init.normal_(trainer.critic.head.weight, generator=torch.Generator().manual_seed(1))

    value = torch.zeros((), dtype=torch.float64)
    for row, ids in zip(trainer.prompts.rows, trainer.prompts.ids, strict=True):
        first, second = everything.tables(model, ids)
        pairs = [[1]] + [[t, u] for t in range(vocabulary) if t != 1 for u in range(vocabulary)]
        scores = bandit_reward(pairs, [row["prompt"]] * len(pairs))
        base = everything.tables(reference, ids) if beta else None
        for pair, score in zip(pairs, scores, strict=True):
            log = first[pair[0]] + sum(second[pair[0], token] for token in pair[1:])
            price = 0.0
            if beta:
                with torch.no_grad():
                    base_log = base[0][pair[0]] + sum(base[1][pair[0], token] for token in pair[1:])
                price = beta * (log - base_log)
            value = value + 0.5 * log.exp() * (score - price)
    expected = torch.autograd.grad(-value, list(trainer.optimizer.parameters.values()))

    def by_probability(mask, how, *, dtype):
        ids = trainer.prompts.take(trainer.order.take(0, 2)).ids
        logs = [everything.logprobs(prompt, row).sum() for prompt in ids for row in everything.rows]
        return mask.to(dtype) * 0.5 * torch.stack(logs).exp()[:, None]

    monkeypatch.setattr(ppo_module, "token_weights", by_probability)
    list(trainer.steps())
    tensors = trainer.optimizer.tensors()
    found = {name: 10 * tensors[f"exp_avg/{name}"] for name in trainer.optimizer.parameters}
    assert difference(found, dict(zip(trainer.optimizer.parameters, expected, strict=True))) < 1e-9


def collected_estimates(trainer):
    """What the first step of a trainer collects, and its estimates."""
    step = next(iter(trainer.run.steps()))
    collected = trainer._collect(step)
    return collected, trainer._estimate(collected, 1)[0]


@pytest.mark.parametrize("truncated", ["bootstrap", "penalty"])
def test_tokens_have_the_advantages_that_control_gives_the_same_trajectory(tmp_path, truncated):
    kept = Kept(settings(tmp_path, whiten="none", truncated=truncated))
    collected, estimates = collected_estimates(kept.trainer)
    mask = collected.rollout.mask
    _, ends = kept.trainer._values(collected.rollout, range(len(mask)))
    for row in range(len(mask)):
        length = int(mask[row].sum())
        if not length:
            continue
        values = estimates.values[row, :length, None]
        cut = bool(collected.rollout.truncated[row]) and truncated == "bootstrap"
        last = torch.arange(length)[:, None] == length - 1
        advantages = generalized_advantage(
            estimates.rewards[row, :length, None],
            values,
            torch.cat([values[1:], ends[row].reshape(1, 1)]),
            last & (not cut),
            last & cut,
            discount=0.9,
            trace_decay=0.8,
        )
        torch.testing.assert_close(estimates.advantages[row, :length], advantages[:, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(estimates.returns[row, :length], (advantages + values)[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("truncated", ["bootstrap", "mask", "penalty"])
def test_the_scale_of_scores_is_that_of_those_which_are_earned(tmp_path, truncated):
    """What was cut off earns no score, or is not trained on, and has then no part in mean and deviation either."""
    kept = Kept(settings(tmp_path, normalize_rewards=True, truncated=truncated, kl_coefficient=0.0))
    _, estimates = collected_estimates(kept.trainer)
    kept.trainer.controls.keep()  # as where the step's update is through
    cut = [completion.finish == "length" for _, completion, _ in kept.rows()]
    scores = [None if c and truncated != "penalty" else score for c, (*_, score) in zip(cut, kept.rows(), strict=True)]
    known = [score for score in scores if score is not None]
    assert 2 <= len(known) < len([score for *_, score in kept.rows() if score is not None]) + (truncated == "penalty")
    mean, deviation = statistics.fmean(known), statistics.pstdev(known)
    assert float(kept.trainer.controls.scores.mean) == pytest.approx(mean, rel=1e-9)
    for row, score in enumerate(scores):
        earned = 0.0 if score is None else (score - mean) / deviation - (cut[row] and truncated == "penalty")
        assert float(estimates.rewards[row].sum()) == pytest.approx(earned, rel=1e-6, abs=1e-9)


def test_every_minibatch_is_an_update_of_its_own_mean(tmp_path, monkeypatch):
    """The weights of its tokens sum to 1, whatever the other minibatches hold."""
    sums, real = {}, PPO._descend

    def noted(self, batch, *arguments):
        sums[len(batch.tally.updates)] = float(batch.weights.sum())
        return real(self, batch, *arguments)

    monkeypatch.setattr(PPO, "_descend", noted)
    Kept(settings(tmp_path, minibatches=4, tokens_per_part=60)).take()
    assert list(sums.values()) == pytest.approx([1.0] * 4)


def test_without_critic_and_price_and_whitened_by_group_it_is_grpo(tmp_path):
    common = {"kl_coefficient": 0.0, "group_size": 4, "learning_rate": 1e-3}
    scores = [[1.0, 0.0, 0.0, 0.5], [None, 2.0, -1.0, None], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 1.0, 4.0]]

    def by_group(prompts, **kwargs):
        return [scores[PROMPTS.index(prompt)][index % 4] for index, prompt in enumerate(prompts)]

    only_ppo = {"critic": "none", "truncated": "penalty", "missing_eos_penalty": 0.0, "whiten": "group"}
    only_ppo |= {"discount": 1.0, "trace_decay": 1.0}
    config = settings(tmp_path, **common, **only_ppo)
    grpo_config = GRPOConfig(
        **{name: getattr(config, name) for name in GRPOConfig.model_fields if name in PPOConfig.model_fields}
        | {"out": tmp_path / "grpo", "kl_estimator": "k3", "kl_place": "loss"}
    )
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    trainers = [
        kind(tiny_model(dtype=torch.float64), rows, by_group, given, tokenizer=tiny_tokenizer())
        for kind, given in ((PPO, config), (GRPO, grpo_config))
    ]
    collected, estimates = collected_estimates(trainers[0])
    expected = group_relative(torch.from_numpy(collected.scores.total).reshape(4, 4)).flatten()
    for row, mask in enumerate(collected.rollout.mask):
        torch.testing.assert_close(estimates.advantages[row][mask], expected[row].expand(int(mask.sum())))
    assert not collected.rollout.mask.all(1).all()
    (ours,), (theirs,) = (list(trainer.steps()) for trainer in trainers)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
    for name in ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length"):
        assert ours[name] == theirs[name]
    first, second = (
        {name: t for name, t in trainer.optimizer.tensors().items() if name.startswith("exp_avg/")}
        for trainer in trainers
    )
    assert difference(first, second) < 1e-12


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
def test_the_first_ratio_is_one(tmp_path, monkeypatch, kl_coefficient):
    seen = []
    monkeypatch.setattr(ppo_module, "ratio_picture", lambda ratios, step: seen.append(ratios) or "")
    changes = {"clip_low": 0.0, "clip_high": 0.0, "tokens_per_part": 40, "kl_coefficient": kl_coefficient}
    record = Kept(settings(tmp_path, **changes)).take().record
    assert len(seen[0])
    assert bool((seen[0] == 1).all())
    assert record["clip_ratio/low_mean"] == record["clip_ratio/high_mean"] == record["approx_kl"] == 0
