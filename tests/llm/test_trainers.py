"""What every trainer does with the settings that they have in common: rates, evaluations, order, draws, checkpoints."""

import pytest
import torch
from tiny_policy import high_ids, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from taurl.llm import DPO, GRPO, PPO, SFT, Reward
from taurl.llm.generation import Sampling
from taurl.llm.scoring.rollouts import Rollout

ROWS = [
    {"prompt": f"{i}+{i % 3}?", "completion": f"{i + i % 3}", "chosen": f"{i + i % 3}", "rejected": f"no {i}"}
    for i in range(10)
]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
SUPERVISED = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
PAIRS = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
SAMPLED = {"prompts_per_step": 2, "group_size": 2, "max_tokens": 4}
# Trainer, rows, what else it is given, and how much a step takes: two rows, of eight that are not held out.
TRAINERS = {
    "grpo": (GRPO, PROMPTS, {"rewards": high_ids}, SAMPLED),
    "ppo": (PPO, PROMPTS, {"rewards": high_ids}, SAMPLED),
    "online dpo": (DPO, PROMPTS, {"rewards": high_ids}, SAMPLED),
    "dpo": (DPO, PAIRS, {}, {"prompts_per_step": 2}),
    "sft": (SFT, SUPERVISED, {}, {"rows_per_step": 2}),
    "reward": (Reward, PAIRS, {}, {"rows_per_step": 2}),
}
ANOTHER = "another"  # a model object as PPO's critic
ONLINE = ("grpo", "ppo", "online dpo")


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "cache"))

    def of(name, **changes):
        kind, rows, given, sizes = TRAINERS[name]
        if changes.get("critic") == ANOTHER:
            given = given | {"critic": tiny_model(seed=1).eval()}
        values = {"out": tmp_path / f"run{len(list(tmp_path.iterdir()))}", "threads": 1, "eval_rows": 2}
        config = kind.config_class(**(values | sizes | changes))
        model = tiny_model()
        if kind is Reward:
            model.config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(model.config)
        return kind(model.eval(), rows, config=config, tokenizer=tiny_tokenizer(), **given)

    return of


# --- the schedule, and when a run evaluates


@pytest.mark.parametrize("name", TRAINERS)
def test_every_update_is_taken_at_the_rate_of_the_schedule(make, name):
    changes = {"critic_learning_rate": 3e-3, "epochs": 1} if name == "ppo" else {}
    schedule = {"steps": 4, "warmup_steps": 2, "schedule": "linear", "learning_rate": 1e-3}
    trainer = make(name, **schedule, layer_decay=0.5, **changes)
    for record, rate in zip(trainer.steps(), [5e-4, 1e-3, 1e-3, 5e-4], strict=True):
        assert record["learning_rate"] == pytest.approx(rate)
        taken = {group["lr"] for group in trainer.optimizer.adam.param_groups}
        assert sorted(taken) == pytest.approx([rate / 8, rate / 4, rate / 2, rate])  # embeddings, two layers, head
        if name == "ppo":
            assert record["value/learning_rate"] == pytest.approx(3 * rate)
            critic_rates = [group["lr"] for group in trainer.critic_optimizer.adam.param_groups]
            assert critic_rates == pytest.approx([3 * rate] * len(critic_rates))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_evaluates_before_it_after_it_and_every_so_many_steps(make, name):
    trainer = make(name, steps=5, eval_every=2).train()
    evaluated = [record["step"] for record in trainer.run.records() if any(key.startswith("eval/") for key in record)]
    assert evaluated == [0, 2, 4, 5]


# --- what a step takes, and how it draws


@pytest.mark.parametrize("name", ["dpo", "sft", "reward"])
def test_no_row_is_trained_on_again_before_all_others(make, name):
    trainer = make(name, steps=4)
    taken, real = [], trainer._update

    def update(batch, step):
        rows = batch.answers.prompts if name == "dpo" else batch
        taken.append([tuple(getattr(row, "prompt", getattr(row, "ids", row))) for row in rows])
        return real(batch, step)

    trainer._update = update
    trainer.train()
    assert [len(rows) for rows in taken] == [2] * 4
    assert len({row for rows in taken for row in rows}) == 8


class Noting:
    """A generator that notes what it was asked for."""

    def __init__(self, generator):
        self.generator, self.asked = generator, []

    def generate(self, prompts, count, sampling, **keywords):
        self.asked.append((prompts, count, sampling, keywords.get("key")))
        return self.generator.generate(prompts, count, sampling, **keywords)

    def release(self):
        self.generator.release()


@pytest.mark.parametrize("name", ONLINE)
def test_every_step_has_prompts_and_draws_of_its_own(make, monkeypatch, name):
    minibatches, cuts = Rollout.minibatches, []
    monkeypatch.setattr(
        Rollout, "minibatches", lambda self, count, key: (cuts.append(key), minibatches(self, count, key))[1]
    )
    changes = {"minibatches": 2, "epochs": 2} if name != "online dpo" else {}
    trainer = make(name, steps=4, seed=7, temperature=0.8, stop=("a", "b."), **changes)
    trainer.generator = noting = Noting(trainer.generator)
    trainer.train()
    first, *steps, last = noting.asked
    for prompts, count, sampling, _ in (first, last):
        assert prompts == trainer.held_out.ids
        assert (count, sampling) == (1, Sampling(4, temperature=0, stop=("a", "b.")))
    assert {sampling for _, _, sampling, _ in steps} == {Sampling(4, temperature=0.8, stop=("a", "b."))}
    assert [key for *_, key in steps] == [(7, step) for step in (1, 2, 3, 4)]
    assert [len(prompts) for prompts, *_ in steps] == [2] * 4
    assert sorted(ids for prompts, *_ in steps for ids in prompts) == sorted(trainer.prompts.ids)
    assert set(cuts) == {(7, step, epoch) for step in (1, 2, 3, 4) for epoch in (0, 1) if name != "online dpo"}


def test_answers_to_held_out_rows_stop_where_they_are_told_to(make):
    trainer = make("sft", steps=1, generate_rows=2, rewards=("last_number",), max_tokens=5, stop=("a",))
    trainer.answering.generator = noting = Noting(trainer.answering.generator)
    trainer.evaluate()
    assert [asked[1:3] for asked in noting.asked] == [(1, Sampling(5, temperature=0, stop=("a",)))]


# --- compiled layers


def test_layers_are_compiled_only_where_that_is_asked_for(make, monkeypatch):
    compiled = []
    monkeypatch.setattr("taurl.llm.algorithms.trainer.compile_layers", lambda model, _: compiled.append(model) or "")
    for name in TRAINERS:
        assert make(name).trained_models()
    assert compiled == []
    trainer = make("ppo", compile_layers=True)
    assert compiled == [trainer.policy.model, trainer.critic.model, trainer.policy.own_reference]
    assert None not in compiled


# --- gradient checkpointing


def computed_again(model):
    """Counts the feed-forward layers that run within a backward pass, as they do where activations were not kept."""
    counts = [0]

    def count(*_):
        counts[0] += torch._C._current_graph_task_id() >= 0

    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize(
    ("name", "changes", "models"),
    [
        *[(name, {}, 2 if name == "ppo" else 1) for name in TRAINERS],
        ("sft", {"lora_rank": 2}, 1),
        ("ppo", {"lora_rank": 2}, 1),
        ("ppo", {"critic": "head"}, 1),
        ("ppo", {"critic": ANOTHER}, 2),
    ],
    ids=str,
)
def test_activations_are_computed_again_only_where_that_is_asked_for(make, name, changes, models):
    for on in (False, True):
        trainer = make(name, steps=1, eval_rows=0, gradient_checkpointing=on, **changes)
        counts = [computed_again(model) for model in trainer.trained_models()]
        next(trainer.steps())
        assert [count > 0 for (count,) in counts] == [on] * models
