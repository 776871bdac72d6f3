"""DPO from Python: what is trained, against what, what is kept, what is refused."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from processes import Child
from safetensors.torch import load_file
from tiny_policy import adapter_hash, high_ids, letter_a, print_adapter_hash, tiny_model, tiny_tokenizer, untimed
from transformers import AutoModelForCausalLM

from taurl.llm import DPO, DPOConfig
from taurl.llm.algorithms.dpo import best_and_worst
from taurl.llm.algorithms.dpo_figures import STEPS_OF_A_FALL, FallWatch
from taurl.llm.data.given_answers import _of_another_prompt
from taurl.llm.models.loading import load_model
from taurl.llm.scoring.reference_logprobs import ReferenceCache, model_hash
from taurl.runtime.errors import InputError

ROWS = [{"prompt": f"{i}+{i % 3}?", "chosen": f"{i + i % 3}", "rejected": f"no {i}"} for i in range(12)]
SINGLE = [{"prompt": f"{i // 2}?", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(12)]
CONFIG = DPOConfig
SETTINGS = {
    "steps": 4,
    "prompts_per_step": 3,
    "eval_rows": 4,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


# --- learning


def test_it_learns_to_prefer_on_prompts_it_has_not_seen(config):
    records = []
    model = tiny_model()
    settings = config(steps=20, prompts_per_step=8, learning_rate=1e-2)
    trainer = DPO(model, ROWS, config=settings, tokenizer=tiny_tokenizer(), callbacks=[records.append]).train()
    assert trainer.policy.model is model
    before, after = records[0], records[-1]
    assert before["eval/loss"] == pytest.approx(np.log(2))
    assert before["eval/rewards/accuracies"] == before["eval/rewards/margins"] == 0  # equal is not told apart
    assert after["eval/rewards/accuracies"] == 1
    assert after["eval/rewards/margins"] > 0.5
    assert records[1]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    expected = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    expected |= {"logps/rejected", "entropy", "grad_norm", "learning_rate", "tokens_per_second"}
    assert expected <= records[-1].keys()
    assert after["rewards/margins"] == pytest.approx(after["rewards/chosen"] - after["rewards/rejected"])
    for name, tensor in load_file(trainer.run.directory / "final" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_it_learns_from_single_answers_and_takes_pairs_for_two_of_them(config, loss_type, tmp_path):
    settings = config(loss_type=loss_type, steps=15, prompts_per_step=8, learning_rate=1e-2, eval_rows=2)
    for rows, out in ((SINGLE, "single"), (ROWS, "pairs")):
        changed = settings.model_copy(update={"out": tmp_path / out})
        records = DPO(tiny_model(), rows, config=changed, tokenizer=tiny_tokenizer()).train().run.records()
        assert records[-1]["rewards/margins"] > 0.2
        assert records[-1]["loss"] < records[1]["loss"]
        assert records[1]["kl"] == pytest.approx(0, abs=1e-6)  # still the reference, which is no better than itself
        assert records[1]["loss"] == pytest.approx(0.5, rel=1e-5)
    assert records[-1]["eval/rewards/chosen"] > records[-1]["eval/rewards/rejected"]


@pytest.mark.parametrize("tokens_per_part", [1, 2048])
def test_answers_of_no_tokens_are_as_likely_as_can_be(config, tokens_per_part):
    """Of a tokenizer without an end of sequence, whose empty answers have nothing at all."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    rows = [{"prompt": f"{i}?", "completion": "", "label": i % 2 == 0} for i in range(4)]
    settings = config(loss_type="kto", steps=1, prompts_per_step=4, eval_rows=0, tokens_per_part=tokens_per_part)
    trainer = DPO(tiny_model(), rows, config=settings, tokenizer=tokenizer).train()
    assert trainer.run.records()[-1]["logps/chosen"] == 0


def test_the_mismatched_answers_of_pairs_are_of_both_kinds(config, folder):
    answers = DPO(str(folder), ROWS, config=config(loss_type="kto", eval_rows=0)).train_answers
    assert [answers.answers[i][1] for i in range(24)] == [answers.answers[(i + 2) % 24][0] for i in range(24)]


def test_a_mismatched_answer_is_cut_to_what_fits_behind_its_prompt(config, folder):
    rows = [{"prompt": "a" * 9, "completion": "b", "label": 1}, {"prompt": "c", "completion": "d" * 9, "label": 0}]
    trainer = DPO(str(folder), rows, config=config(loss_type="kto", eval_rows=0, max_length=14))
    answers = trainer.train_answers
    both = zip(answers.prompts, answers.answers, strict=True)
    assert [len(prompt) + len(other) for prompt, (_, other) in both] == [14, 6]


def test_of_rows_with_one_prompt_each_has_an_answer_to_another():
    assert _of_another_prompt([[1], [1], [1], [2], [2], [3], [1]]) == [3, 4, 3, 5, 5, 6, 3]


def test_kto_holds_one_prompt_out_and_compares_it_with_answers_to_the_others(config, folder):
    trainer = DPO(str(folder), ROWS, config=config(loss_type="kto", eval_rows=1, steps=1))
    held_out, known = trainer.held_out_answers, [answer[0] for answer in trainer.train_answers.answers]
    assert len({tuple(prompt) for prompt in held_out.prompts}) == 1
    assert all(answer[1] in known for answer in held_out.answers)
    assert "eval/kl" in trainer.train().run.records()[-1]


def test_an_answer_that_was_cut_off_is_not_preferred_where_that_has_a_price(config, folder):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    settings = config(steps=1, prompts_per_step=8, group_size=8, max_tokens=12, samples_per_step=64, eval_rows=0)
    run = DPO(str(folder), rows, high_ids, settings.model_copy(update={"missing_eos_penalty": 100.0})).train().run
    groups = [run.samples()[start : start + 8] for start in range(0, 64, 8)]
    mixed = [group for group in groups if len({sample["finish"] for sample in group}) == 2]
    assert mixed
    for group in mixed:
        (chosen,) = [sample for sample in group if sample["advantage"] == 1]
        assert chosen["finish"] == "stop"


def test_what_compiled_layers_say_is_not_taken_for_what_others_do(config, folder):
    """They round otherwise, and a kept reference is to be repeated exactly."""
    trainer = DPO(str(folder), ROWS, config=config(steps=1))
    plain = trainer._circumstances()
    trainer.config = trainer.config.model_copy(update={"compile_layers": True})
    assert trainer._circumstances() != plain


def test_the_hash_of_an_adapter_is_the_same_in_every_process():
    """Though its settings hold sets, whose order differs from process to process."""
    code, said = Child(print_adapter_hash).wait()
    *_, seed, found = said.split()
    if seed == str(hash("a")):
        pytest.skip("PYTHONHASHSEED gives all processes one order of sets")
    assert (code, found) == (0, adapter_hash())
    assert len(adapter_hash()) == 64


def test_the_hash_of_a_model_knows_how_its_adapter_is_scaled():
    def hashed(alpha):
        torch.manual_seed(0)
        settings = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        return model_hash(get_peft_model(tiny_model(), settings))

    assert hashed(4) == hashed(4) != hashed(8)


def test_a_cache_that_cannot_be_written_stops_nothing(config, folder, cache, capfd):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    run = DPO(str(folder), ROWS, config=config(steps=1)).train().run
    assert run.step == 1
    assert "will be computed again by the next run" in " ".join(capfd.readouterr().err.split())


def test_online_it_learns_a_letter_from_its_own_answers(config, folder):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    settings = config(steps=25, prompts_per_step=8, group_size=4, learning_rate=1e-2, eval_rows=3, max_tokens=6)
    run = DPO(str(folder), rows, letter_a, settings).train().run
    records = run.records()
    assert records[-1]["eval/reward"] > records[0]["eval/reward"] + 0.3
    assert np.mean([r["reward"] for r in records[-3:]]) > np.mean([r["reward"] for r in records[1:4]]) + 0.3
    assert records[1]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert records[1]["rewards/margins"] == 0
    kinds = [sample["kind"] for sample in run.samples()]
    assert kinds.count("train") == 25 * settings.samples_per_step
    assert kinds.count("evaluation") == 2 * 3


def test_best_and_worst_answers():
    rewards = np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [np.nan, 0.5, np.nan], [np.nan] * 3, [3.0, np.nan, 1.0]])
    assert best_and_worst(rewards) == {0: (1, 0), 4: (0, 2)}


def test_a_step_in_which_no_answers_differ_moves_by_momentum_alone(config):
    rows = [{"prompt": row["prompt"]} for row in ROWS]

    def alike(completions, trainer_state, **kwargs):
        first = trainer_state.global_step == 0
        return [float(i) if first else 1.0 for i in range(len(completions))]

    trainer = DPO(tiny_model(), rows, alike, config(steps=2, eval_rows=0, max_tokens=6), tokenizer=tiny_tokenizer())
    steps = trainer.steps()
    next(steps)
    before = {name: tensor.clone() for name, tensor in trainer.optimizer.tensors().items()}
    record = next(steps)
    assert record["pairs"] == record["loss"] == record["grad_norm"] == 0
    assert not {name for name in record if name.startswith(("rewards/chosen", "logps/"))}
    after = trainer.optimizer.tensors()
    averages = [name for name in before if name.startswith("exp_avg/")]
    assert averages
    for name in averages:
        torch.testing.assert_close(after[name], 0.9 * before[name], rtol=1e-5, atol=1e-8)


def test_the_pairs_of_a_step_are_those_whose_rewards_differ(config, folder):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    judged = []

    def kept(completions, **kwargs):
        judged.append(letter_a(completions))
        return judged[-1]

    settings = config(steps=6, prompts_per_step=8, group_size=4, eval_rows=0, max_tokens=6)
    records = DPO(str(folder), rows, kept, settings).train().run.records()
    expected = [sum(len(set(one[start : start + 4])) > 1 for start in range(0, 32, 4)) for one in judged]
    assert [record["pairs"] for record in records] == expected
    assert 0 < max(expected) < 8
    for record in records:  # tokens that were sampled, by the seconds of the whole step
        seconds = sum(record[f"time/{phase}"] for phase in ("sample", "reward", "reference", "update"))
        sampled = record["sampling/tokens_per_second"] * record["time/sample"]
        assert record["tokens_per_second"] == pytest.approx(sampled / seconds)


def test_online_the_reference_is_the_model_at_first_or_the_one_that_is_given(config, folder):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    margins = []
    for reference in (None, tiny_model(seed=1)):
        settings = config(steps=2, eval_rows=0, max_tokens=6, out=config().out.parent / str(len(margins)))
        first, second = DPO(str(folder), rows, high_ids, settings, reference=reference).train().run.records()
        assert (first["loss"] == pytest.approx(np.log(2), rel=1e-6)) == (reference is None)
        assert (first["rewards/margins"] == 0) == (reference is None)
        assert second["rewards/margins"] != 0
        assert 0 < first["sampling/logp_difference_mean"] < 1e-5
        margins.append(second["rewards/margins"])
    assert margins[0] != margins[1]


# --- the reference


def test_the_reference_kept_on_disk_gives_what_one_in_memory_gives(config, folder, tmp_path, cache):
    kept = DPO(str(folder), ROWS, config=config()).train().run
    live = DPO(str(folder), ROWS, config=config(cache_reference=False, out=tmp_path / "live")).train().run
    for one, other in zip(untimed(kept.records()), untimed(live.records()), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert len(list(cache.iterdir())) == 2  # training and held-out rows


def test_it_is_computed_once_for_what_the_run_takes_and_again_when_damaged(config, folder, tmp_path, cache, capsys):
    changed = config(steps=2, prompts_per_step=2)
    DPO(str(folder), ROWS, config=changed).train()
    assert capsys.readouterr().err.count("reference's log-probabilities of 4 rows once") == 2
    known = [load_file(path)["logprobs"].isnan().any(1) for path in cache.iterdir()]
    assert sorted((len(rows), int(rows.sum())) for rows in known) == [(4, 0), (8, 4)]
    again = changed.model_copy(update={"out": tmp_path / "again", "beta": 0.5, "learning_rate": 1e-3})
    DPO(str(folder), ROWS, config=again).train()
    assert "reference's" not in capsys.readouterr().err
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    third = DPO(str(folder), ROWS, config=changed.model_copy(update={"out": tmp_path / "third"})).train()
    assert untimed(third.run.records())[-1] == untimed(DPO.resume(tmp_path / "run", dataset=ROWS).run.records())[-1]


@pytest.mark.parametrize("change", ["weights", "rows", "excess_weight"])
def test_what_is_kept_is_known_by_weights_rows_and_settings(config, folder, tmp_path, cache, change):
    DPO(str(folder), ROWS, config=config()).train()
    before = len(list(cache.iterdir()))
    model = tiny_model(seed=1) if change == "weights" else tiny_model()
    rows = [*ROWS, {**ROWS[0], "chosen": "other"}] if change == "rows" else ROWS
    changes = {"excess_weight": 0.5} if change == "excess_weight" else {}
    settings = config(out=tmp_path / "other", **changes)
    DPO(model, rows, config=settings, tokenizer=tiny_tokenizer()).train()
    assert len(list(cache.iterdir())) >= before + 1


def test_what_one_gpu_said_is_not_what_another_says(config, monkeypatch):
    trainer = object.__new__(DPO)
    trainer.config, trainer.device = config(), torch.device("cuda")
    trainer.policy = SimpleNamespace(model=tiny_model())
    said = []
    for name in ("NVIDIA L4", "NVIDIA H100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        said.append(trainer._circumstances())
    assert said[0] != said[1]


def test_another_model_as_the_reference_by_folder_and_as_an_object(config, folder, tmp_path):
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    runs = []
    for place, (reference, kept) in enumerate([(str(tmp_path / "other"), True), (other, True), (other, False)]):
        settings = config(out=tmp_path / f"run{place}", cache_reference=kept, steps=2)
        runs.append(DPO(str(folder), ROWS, config=settings, reference=reference).train().run)
    first = untimed(runs[0].records())
    assert first[0]["eval/rewards/margins"] != 0
    for run in runs[1:]:
        for one, record in zip(untimed(run.records()), first, strict=True):
            assert one == pytest.approx(record, rel=1e-5, abs=1e-6)
    again = DPO(str(folder), ROWS, config=config(out=tmp_path / "again"), reference=str(tmp_path / "other"))
    again.evaluate()  # all of it is known
    assert again.reference._loaded is None
    with pytest.raises(InputError, match="its reference came from Python as an object"):
        DPO.resume(tmp_path / "run1", dataset=ROWS)
    assert DPO.resume(tmp_path / "run1", dataset=ROWS, reference=other)


@pytest.mark.parametrize("kept", [True, False])
def test_with_an_adapter_the_reference_is_the_model_without_it(config, folder, kept):
    settings = config(lora_rank=2, lora_targets=("q_proj", "v_proj"), learning_rate=3e-2, cache_reference=kept)
    trainer = DPO(str(folder), ROWS, config=settings).train()
    records = trainer.run.records()
    assert records[0]["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(records[-1]["eval/rewards/chosen"]) > 1e-4
    assert trainer.policy._reference is None  # nothing was copied
    plain, loaded = (
        load_model(str(folder), dtype=torch.float32),
        load_model(str(trainer.run.directory / "final"), dtype=torch.float32),
    )
    assert isinstance(loaded, PeftModel)
    row = trainer.held_out_answers.take([0], trainer.device)
    expected = trainer.reference.given(trainer.held_out_answers, [0], row)
    torch.testing.assert_close(trainer._logprobs(plain, row), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trainer._logprobs(loaded, row), expected)


def test_a_run_keeps_no_second_model_where_none_is_needed(config, folder, tmp_path):
    assert DPO(str(folder), ROWS, config=config()).policy._reference is None
    assert DPO(str(folder), ROWS, config=config(loss_type="simpo", cache_reference=False)).policy._reference is None
    assert DPO(str(folder), ROWS, config=config(cache_reference=False)).policy._reference is not None


# --- resuming


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_reference": False, "loss_type": "aot", "tokens_per_part": 60},
        {"loss_type": "bco_pair", "reward_shift": "running", "schedule": "linear"},
        {"loss_type": "kto"},
        {"lora_rank": 2},
    ],
    ids=str,
)
def test_resuming_is_exact(config, folder, tmp_path, changes):
    settings = config(steps=6, save_every=2, eval_every=2, **changes)
    whole = DPO(str(folder), ROWS, config=settings).train().run
    first = DPO(str(folder), ROWS, config=settings.model_copy(update={"out": tmp_path / "cut"}))
    steps = first.steps()
    for _ in range(5):
        next(steps)
    steps.close()
    resumed = DPO.resume(tmp_path / "cut", dataset=ROWS).train().run
    assert untimed(resumed.records()) == untimed(whole.records())
    name = "adapter_model.safetensors" if settings.lora_rank else "model.safetensors"
    assert (resumed.directory / "final" / name).read_bytes() == (whole.directory / "final" / name).read_bytes()


def test_more_steps_on_resume_equal_a_longer_run_with_another_cache(config, folder, tmp_path, monkeypatch):
    whole = DPO(str(folder), ROWS, config=config(steps=6, eval_rows=2)).train().run
    monkeypatch.setenv("TAURL_CACHE", str(tmp_path / "other"))
    shorter = config(steps=3, eval_rows=2, out=tmp_path / "short", eval_every=6)
    run = DPO(str(folder), ROWS, config=shorter).train().run
    longer = DPO.resume(run.directory, run.config.model_copy(update={"steps": 6}), dataset=ROWS).train().run
    weights = "final/model.safetensors"
    assert (longer.directory / weights).read_bytes() == (whole.directory / weights).read_bytes()


@pytest.mark.parametrize("online", [False, True])
def test_epochs_set_the_steps_where_these_are_not_given(config, folder, online):
    rows, reward = ([{"prompt": row["prompt"]} for row in ROWS], high_ids) if online else (ROWS, ())
    sampled = {"max_tokens": 6} if online else {}
    run = DPO(str(folder), rows, reward, config(steps=0, epochs=1.5, **sampled)).train().run
    assert run.config.steps == run.step == 4  # of 8 rows, 3 in a step
    assert run.records()[-1]["epoch"] == pytest.approx(4 * 3 / 8)
    again = config(model=str(folder), steps=0, epochs=1.5, **sampled)  # as the user wrote it
    given = {"rewards": reward} if online else {}
    assert DPO.resume(run.directory, again, dataset=rows, **given).run.config.steps == 4


def test_online_runs_resume_exactly(config, folder, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    settings = config(save_every=1, max_tokens=6)
    whole = DPO(str(folder), rows, high_ids, settings).train().run
    first = DPO(str(folder), rows, high_ids, settings.model_copy(update={"out": tmp_path / "cut"}))
    steps = first.steps()
    for _ in range(2):
        next(steps)
    steps.close()
    resumed = DPO.resume(tmp_path / "cut", dataset=rows, rewards=high_ids).train().run
    assert untimed(resumed.records()) == untimed(whole.records())


# --- what is said, and refused


def test_evaluating_writes_nothing_and_needs_no_run(config, folder):
    trainer = DPO(str(folder), ROWS, config=config(steps=1))
    before = trainer.evaluate()
    assert not trainer.run.directory.exists()
    trainer.train()
    first, last = (json.loads(line) for line in (trainer.run.directory / "metrics.jsonl").read_text().splitlines())
    assert before.items() <= first.items()
    assert trainer.evaluate()["eval/rewards/margins"] == last["eval/rewards/margins"]
    with pytest.raises(InputError, match="no held-out rows to evaluate on"):
        DPO(str(folder), ROWS, config=config(eval_rows=0, out=None)).evaluate()


def test_it_says_once_that_both_likelihoods_fall():
    def said(chosen, rejected):
        watch, draw = FallWatch(), np.random.default_rng(0)
        rows = zip(chosen, rejected, strict=True)
        noisy = [(c + draw.normal(0, 0.01), r + draw.normal(0, 0.01)) for c, r in rows]
        words = [
            watch.warning({"rewards/chosen": c, "rewards/rejected": r, "rewards/margins": c - r}) for c, r in noisy
        ]
        return [(place, word) for place, word in enumerate(words) if word]

    falls, rises, level = [0.0] + [-0.1] * 24, [0.0] + [0.1] * 24, [-3.0] * 25
    ((place, words),) = said(falls, falls)
    assert place == STEPS_OF_A_FALL  # ten steps after the first
    assert words.startswith("both likelihoods fall: the reward of the last 10 steps is below that of the first by 0.")
    ((place, _),) = said([0.0, -1.5, -3.0, -4.0, *[-4.5] * 21], [0.0, -2.0, -4.0, -5.0, *[-5.5] * 21])
    assert place < 20  # a fast one, too
    watch = FallWatch()
    assert watch.warning({"rewards/chosen": None, "rewards/rejected": math.nan, "rewards/margins": None}) is None
    assert watch.first is None  # a step that was not taken
    assert said(rises, falls) == said(falls, level) == []  # another reference may lie above from the start


def test_a_cache_that_belongs_to_other_shapes_is_not_taken():
    first = ReferenceCache(["key"], (2, 2), torch.float32)
    first.put([0], torch.ones(1, 2))
    first.save()
    assert ReferenceCache(["key"], (2, 2), torch.float32).missing([1, 0, 1]) == [1]
    assert ReferenceCache(["key"], (3, 2), torch.float32).missing([0, 1]) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing is 0.1, but ipo does not read it"),
        ({"divergence": "forward_kl", "loss_type": "kto"}, "divergence is 'forward_kl', but kto does not read it"),
        (
            {"divergence": "forward_kl", "loss_type": ("sigmoid", "bco_pair")},
            "divergence is forward_kl, but bco_pair is defined for reverse_kl only",
        ),
        ({"divergence_alpha": 0.3}, "divergence_alpha is 0.3, but reverse_kl does not read it"),
        ({"target_margin": 2.0}, "target_margin is 2.0, but sigmoid does not read it"),
        ({"loss_type": "exo_pair"}, "loss_type exo_pair: label_smoothing is 0.0, expected"),
        ({"loss_type": "simpo", "reference": "other"}, "a reference is given, but simpo needs none"),
        ({"excess_weight": 0.5, "loss_type": "kto"}, "excess_weight is 0.5, but kto does not read it"),
        (
            {"excess_weight": 0.5, "loss_type": ("sigmoid", "sft")},
            "excess_weight is 0.5, but sft learns the likelihood of whole answers",
        ),
        ({"reward_shift": "running"}, "reward_shift is 'running', but sigmoid does not read it"),
        ({"beta": 0.5, "loss_type": "sft"}, "beta is 0.5, but sft does not read it"),
        ({"max_tokens": 64}, "max_tokens is 64, but it is for answers that are sampled and judged"),
        (
            {"rewards": ("last_number",), "max_length": 64},
            "max_length is 64, but it is not for answers",
        ),
    ],
)
def test_settings_that_no_loss_reads_are_refused_before_the_model_is_loaded(config, changes, message):
    with pytest.raises(InputError, match=message):
        DPO("no-such-model", ROWS, config=config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": ()}, "expected one loss, or several different ones"),
        ({"loss_type": ("sft", "sft")}, "expected one loss, or several different ones"),
        ({"loss_type": ("kto", "sft")}, "mix with no other loss"),
        ({"loss_type": "sigmoid", "loss_weights": (1.0, 2.0)}, "2 loss_weights for 1 losses"),
        ({"loss_weights": (float("nan"),)}, "should be a finite number"),
    ],
)
def test_settings_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**changes)


def test_bad_data_and_a_reference_of_another_family_are_refused(config, folder, tmp_path):
    with pytest.raises(InputError, match="rewards make pairs, but kto takes single answers"):
        DPO(str(folder), ROWS, letter_a, config(loss_type="kto"))
    with pytest.raises(InputError, match=r"row 11 of the data: its label is 0\.5; expected true or false"):
        DPO(str(folder), [*SINGLE[2:], {**SINGLE[0], "label": 0.5}], config=config(loss_type="kto", eval_rows=4))
    with pytest.raises(InputError, match="all 2 rows have one prompt; kto compares"):
        DPO(str(folder), SINGLE[:2], config=config(loss_type="kto", eval_rows=0))
    with pytest.raises(InputError, match="no column 'chosen'"):
        DPO(str(folder), SINGLE, config=config())
    other = tiny_tokenizer()
    other.add_tokens(["word"])
    tiny_model().save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"reference '.*other' has another tokenizer than the model"):
        DPO(str(folder), ROWS, config=config(), reference=str(tmp_path / "other"))
    model = tiny_model()
    with pytest.raises(InputError, match="the reference is the very object that is trained"):
        DPO(model, ROWS, config=config(), reference=model, tokenizer=tiny_tokenizer())
    with pytest.raises(InputError, match="the reference knows 20 tokens"):
        DPO(str(folder), ROWS, config=config(), reference=tiny_model(vocab_size=20))


def test_rows_that_are_too_long_are_left_out_and_counted(config, folder, capsys):
    rows = [*ROWS, {"prompt": "long?", "chosen": "a" * 60, "rejected": "b"}]
    trainer = DPO(str(folder), rows, config=config(max_length=40))
    assert "1 rows left out: longer than max_length" in capsys.readouterr().err
    assert len(trainer.train_answers) + len(trainer.held_out_answers) == len(ROWS)


def test_the_strength_of_simpo_is_its_own_alone_and_beside_the_likelihood():
    assert DPOConfig(loss_type=("simpo",)).strength == DPOConfig(loss_type=("simpo", "sft")).strength == 2
    assert DPOConfig(loss_type=("simpo", "sigmoid")).strength == 0.1


def test_the_reference_is_kept_by_how_attention_is_computed(config, folder, cache):
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
        trainer = DPO(model, ROWS, config=config(out=None), tokenizer=tiny_tokenizer())
        trainer._know_reference()
    assert len(list(cache.iterdir())) == 4  # of training and held-out rows of each


def test_an_update_of_kto_whose_numbers_are_not_finite_is_left_out(config, folder):
    trainer = DPO(str(folder), SINGLE, config=config(loss_type=("kto",), steps=1, eval_rows=0))
    real = trainer._logprobs
    trainer._logprobs = lambda *given: real(*given) * float("nan")
    (record,) = trainer.steps()
    assert record["updates_skipped"] == 1
