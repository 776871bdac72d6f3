"""Reward models from Python: what is learned, resumed, exported, and used as a reward."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny_policy import TEMPLATE, KeepFloat64, tiny_model, tiny_tokenizer, untimed
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from taurl.functional.preference import pairwise_loss
from taurl.llm import GRPO, GRPOConfig, Reward, RewardConfig
from taurl.llm.data.completion_ids import Conversations
from taurl.llm.data.preference_rows import PreferenceReader
from taurl.llm.evaluation import TrainerState
from taurl.llm.models.loading import load_model
from taurl.llm.rewards import RewardSet, reward_model
from taurl.llm.scoring.reward_scores import pad_token_id, row_scores
from taurl.runtime.errors import InputError, Interrupted, RunError

CONFIG = RewardConfig
SETTINGS = {
    "steps": 3,
    "rows_per_step": 4,
    "eval_rows": 8,
}
# Better is what holds more of the letter a; lengths vary.
PAIRS = [
    {
        "prompt": f"{i}+{i % 7}?",
        "chosen": "a" * (1 + i % 3) + "b" * (i % 2),
        "rejected": "bc" * (1 + i % 2) + "d" * (i % 4),
    }
    for i in range(40)
]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run that has learned."""
    out = tmp_path_factory.mktemp("reward") / "run"
    config = RewardConfig(
        out=out, steps=40, rows_per_step=8, eval_rows=8, threads=1, precision="float32", learning_rate=3e-3
    )
    return Reward(str(folder), PAIRS, config).train()


def test_epochs_set_the_steps_where_these_are_not_given(config, folder):
    run = Reward(str(folder), PAIRS[:20], config(steps=0, epochs=1.5)).train().run
    assert run.config.steps == run.step == 5  # of 12 rows, 4 in a step
    assert run.records()[-1]["epoch"] == pytest.approx(5 * 4 / 12)


def test_it_learns_which_of_two_is_better(trained):
    records = trained.run.records()
    assert records[-1]["eval/accuracy"] == 1.0
    assert records[-1]["eval/loss"] < 0.2 < 0.5 < records[0]["eval/loss"]
    assert records[-1]["loss"] < records[1]["loss"]
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= records[1].keys()
    names = {
        "auc",
        "calibration_error",
        "length_correlation",
        "longer_preferred",
        "accuracy_low",
        "accuracy/margin_quarter_1",
    }
    assert {f"eval/{name}" for name in names} <= records[-1].keys()
    assert {path.name for path in (trained.run.directory / "artifacts").iterdir()} == {"scores.svg", "calibration.svg"}
    samples = trained.run.samples()
    assert len(samples) == 2 * 2 * 8
    assert {sample["row"] for sample in samples} >= {"0 chosen", "0 rejected", "7 chosen"}
    held_out = {row["prompt"] for row in trained.held_out.rows}
    assert held_out.isdisjoint(row["prompt"] for row in trained.train_rows.rows)


def test_held_out_scores_that_are_not_finite_stop_nothing(folder, config, monkeypatch):
    monkeypatch.setattr(Reward, "_scores", lambda self, rows: [[float("nan")] * 2 for _ in range(len(rows))])
    trainer = Reward(str(folder), PAIRS, config(steps=1)).train()
    assert trainer.run.records()[-1]["eval/calibration_error"] is None
    assert trainer.run.step == 1


def test_the_first_loss_is_that_of_transformers_own_scores(folder, config):
    trainer = Reward(str(folder), PAIRS, config(eval_rows=0, steps=1, centering=0.1))
    model, tokenizer = trainer.policy.model, trainer.policy.tokenizer
    rows = [trainer.train_rows.rows[index] for index in trainer.order.take(0, 4)]
    scores = []
    for row in rows:
        for name in ("chosen", "rejected"):
            text = f"<user>{row['prompt']}<end><assistant>{row[name]}<end>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(float(model(input_ids=ids).logits))
    pairs = torch.tensor(scores).view(-1, 2)
    expected = float(pairwise_loss(pairs[:, 0], pairs[:, 1], centering=0.1).mean())
    (record,) = list(trainer.steps())
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert record["accuracy"] == float((pairs[:, 0] > pairs[:, 1]).float().mean())


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def naive_losses(loss, row, scores, config, classes=3):
    """The losses of a row's units, given its scores."""
    judged = row.step_labels or row.values
    match loss:
        case "bradley_terry":
            better, worse = scores
            return [-log_sigmoid(better - worse - row.margin) + config.centering * (better + worse) ** 2]
        case "plackett_luce":
            rest = [math.log(sum(math.exp(score) for score in scores[place:])) for place in range(len(scores))]
            return [sum(rest) - sum(scores)]
        case "mse":
            return [0.5 * (score - target) ** 2 for score, target in zip(scores, judged, strict=True)]
        case "huber":
            limit = config.huber_threshold
            far = [abs(score - target) for score, target in zip(scores, judged, strict=True)]
            return [0.5 * d * d if d <= limit else limit * (d - 0.5 * limit) for d in far]
        case "ordinal":
            bounds = [-math.inf, *(k - (classes - 2) / 2 for k in range(classes - 1)), math.inf]
            above = [[1 / (1 + math.exp(bound - score)) for bound in bounds[:-1]] + [0.0] for score in scores]
            return [-math.log(one[int(label)] - one[int(label) + 1]) for one, label in zip(above, judged, strict=True)]
    return [-log_sigmoid(score if label else -score) for score, label in zip(scores, judged, strict=True)]


def naive_loss(trainer):
    """The mean over the units of the training rows, each scored by one forward pass of one sequence."""
    losses = []
    for row in trainer.train_rows.judged:
        scores = []
        for completion in row.completions:
            with torch.no_grad():
                logits = trainer.policy.model(input_ids=torch.tensor([row.prompt + completion])).logits.double()
            ends = [len(row.prompt) + end for end in row.step_ends]
            scores += logits[0, ends, 0].tolist() if ends else logits.flatten().tolist()
        losses += naive_losses(trainer.config.loss, row, scores, trainer.config)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce", "mse", "huber", "bce", "ordinal", "process"])
def test_every_loss_is_that_of_plain_formulas_and_parts_leave_its_gradient_unchanged(loss, config, tmp_path):
    """One update in float64 with all rows at once, and with parts of one row each."""
    rows = {
        "plackett_luce": [{"prompt": "a", "completions": ["b", "cc", "ddd"][: 2 + i % 2]} for i in range(6)],
        "ordinal": [{"prompt": "a", "completion": "b" * (1 + i), "label": i % 3} for i in range(6)],
        "mse": [{"prompt": "a", "completion": "b" * (1 + i), "score": i / 2} for i in range(6)],
        "huber": [{"prompt": "a", "completion": "b" * (1 + i), "score": i / 2} for i in range(6)],
        "process": [
            {"prompt": "a", "completions": ["b"] * (1 + i % 3), "labels": [1, i % 2, 0][: 1 + i % 3]} for i in range(6)
        ],
    }.get(loss, [row | {"margin": 0.3 * i} for i, row in enumerate(PAIRS[:6])])
    options = {"huber": {"huber_threshold": 0.7}, "bradley_terry": {"centering": 0.1}}.get(loss, {})

    def update(tokens):
        """Loss by formula, loss as trained, and gradient."""
        with KeepFloat64():
            kind = AutoModelForTokenClassification if loss == "process" else AutoModelForSequenceClassification
            settings = tiny_model().config
            settings.num_labels = 1
            torch.manual_seed(0)
            model = kind.from_config(settings).double()
            changes = {"loss": loss, "tokens_per_part": tokens, "rows_per_step": 6, "steps": 1, "eval_rows": 0}
            trainer = Reward(
                model,
                rows,
                config(
                    **changes, **options, scale_rows=0, out=tmp_path / str(tokens), precision="auto", max_grad_norm=1e9
                ),
                tokenizer=tiny_tokenizer(),
            )
            expected = naive_loss(trainer)
            gradients = []
            original = trainer.optimizer.adam.step

            def step():
                gradients.append({n: m.grad.clone() for n, m in trainer.optimizer.masters.items()})
                return original()

            trainer.optimizer.adam.step = step
            (record,) = list(trainer.steps())
            return expected, record["loss"], gradients[0]

    (expected, whole_loss, whole), (_, loss_of_parts, parts) = update(10_000), update(1)
    assert whole_loss == pytest.approx(expected, rel=1e-9)
    assert loss_of_parts == pytest.approx(expected, rel=1e-9)
    largest = max(float(g.abs().max()) for g in whole.values())
    assert largest > 0
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max() < 1e-9 * max(float(gradient.abs().max()), 1e-3 * largest), name


@pytest.mark.parametrize("rank", [0, 2])
def test_it_resumes_exactly(config, folder, tmp_path, rank):
    settings = config(steps=4, save_every=2, lora_rank=rank)
    whole = Reward(str(folder), PAIRS, settings).train().run
    first = Reward(str(folder), PAIRS, settings.model_copy(update={"out": tmp_path / "cut"}))
    steps = first.steps()
    for _ in range(3):
        next(steps)
    steps.close()
    resumed = Reward.resume(tmp_path / "cut", dataset=PAIRS).train().run
    assert untimed(resumed.records()) == untimed(whole.records())
    for name in ("adapter_model.safetensors" if rank else "model.safetensors", "taurl_reward.json"):
        assert (resumed.directory / "final" / name).read_bytes() == (whole.directory / "final" / name).read_bytes()
    with pytest.raises(InputError, match="the data is not what the run began with"):
        Reward.resume(tmp_path / "cut", dataset=PAIRS[:-1])


def test_other_tools_load_the_folder_and_score_the_same(trained):
    final = trained.run.directory / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    prompts, completions = ["1+1?", "1+1?", "2+5?"], ["aab", "bcd", "a"]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}], tokenize=False
        )
        for p, c in zip(prompts, completions, strict=True)
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    reward = reward_model(str(final))
    assert reward(prompts=prompts, completions=completions) == pytest.approx(own.tolist(), rel=1e-4, abs=1e-5)
    messages = [[{"role": "user", "content": p}] for p in prompts]
    said = [[{"role": "assistant", "content": c}] for c in completions]
    assert reward(prompts=messages, completions=said) == pytest.approx(own.tolist(), rel=1e-4, abs=1e-5)
    note = json.loads((final / "taurl_reward.json").read_text())
    scaled = reward_model(str(final), normalize=True)(prompts=prompts, completions=completions)
    assert scaled == pytest.approx([(v - note["mean"]) / note["deviation"] for v in own.tolist()], rel=1e-3, abs=1e-4)
    one_by_one = reward_model(str(final), tokens_per_part=1)
    assert one_by_one(prompts=prompts, completions=completions) == pytest.approx(own.tolist(), rel=1e-4, abs=1e-5)
    assert math.isfinite(reward(prompts=["1+1?"], completions=[""])[0])


def test_the_scale_is_that_of_the_training_rows(trained):
    scores = [v for values in row_scores(trained.policy.model, trained.train_rows.judged, 999) for v in values]
    note = trained.policy.note
    assert note.mean == pytest.approx(sum(scores) / len(scores), rel=1e-4)
    assert note.deviation == pytest.approx(float(torch.tensor(scores).std(correction=0)), rel=1e-4)


def test_an_interrupted_run_leaves_a_reward_model_that_does_not_know_its_scale(config, folder):
    trainer = Reward(str(folder), PAIRS, config(steps=4))
    trainer.run.callbacks = [lambda record: record["step"] == 2 and os.kill(os.getpid(), signal.SIGINT)]
    with pytest.raises(Interrupted):
        trainer.train()
    final = trainer.run.directory / "final"
    assert "Steps: 2 of 4." in (final / "README.md").read_text()
    rows = {"prompts": ["1+1?"], "completions": ["ab"]}
    trainer.export(final.with_name("again"))
    assert reward_model(str(final))(**rows) == reward_model(str(final.with_name("again")))(**rows)
    with pytest.raises(InputError, match="does not know the mean and deviation of its scores"):
        reward_model(str(final), normalize=True)
    trainer.train()
    assert math.isfinite(reward_model(str(final), normalize=True)(**rows)[0])


@pytest.mark.parametrize("loss", ["bradley_terry", "process"])
def test_an_adapter_is_trained_with_the_head_and_used_as_a_reward(config, folder, loss):
    rows = PAIRS
    if loss == "process":
        rows = [{"prompt": f"{i}?", "completions": ["aa", "bb"], "labels": [True, False]} for i in range(12)]
    settings = config(lora_rank=2, steps=3, learning_rate=3e-2, eval_rows=4, loss=loss)
    trainer = Reward(str(folder), rows, settings).train()
    model = trainer.policy.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    assert any("score" in name for name in trained)
    assert not any("score" in name and "lora" in name for name in trained)
    final = trainer.run.directory / "final"
    reward = reward_model(str(final))
    assert isinstance(reward.model, PeftModel)
    kind = AutoModelForTokenClassification if loss == "process" else AutoModelForSequenceClassification
    other = PeftModel.from_pretrained(kind.from_pretrained(folder, num_labels=1), final).eval()
    ids = torch.tensor([[3, 32, 43, 33, 1, 4, 9, 1]])
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids).logits, reward.model(input_ids=ids).logits)
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    if loss == "process":
        found = reward(prompts=["1?", "1?"], completions=["aa", "  "])
        assert found[1] is None
        assert math.isfinite(found[0])
        template = TEMPLATE.replace("message['content']", "message['content'] | replace('b', '')")
        reward.conversations.tokenizer.chat_template = template  # as one that rewrites what a policy may write
        assert [one is None for one in reward(prompts=["1?", "1?"], completions=["ab", "aa"])] == [True, False]


def test_a_reward_model_that_is_out_of_memory_says_what_to_lower(config, folder, monkeypatch):
    trainer = Reward(str(folder), PAIRS, config(eval_rows=0)).train()

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("taurl.llm.scoring.reward_scores.row_scores", exhausted)
    rewards = RewardSet([f"model:{trainer.run.directory / 'final'}"])
    with pytest.raises(RunError, match=r"out of memory: lower tokens_per_part of the reward model"):
        rewards(prompts=["1?"], completions=["2"], completion_ids=[[1]], columns={}, trainer_state=TrainerState(0, 1))


def test_an_adapter_is_pooled_as_in_training_where_its_base_has_no_pad_token(config, tmp_path):
    base = tmp_path / "base"
    tiny_model(pad_token_id=None).save_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<end>"
    tokenizer.save_pretrained(base)
    trainer = Reward(str(base), PAIRS, config(lora_rank=2, learning_rate=3e-2, eval_rows=0)).train()
    assert pad_token_id(trainer.policy.model) == 1
    rows = trainer.train_rows
    expected = [value for values in row_scores(trainer.policy.model, rows.judged, 999) for value in values]
    reward = reward_model(str(trainer.run.directory / "final"))
    prompts = [row["prompt"] for row in rows.rows for _ in range(2)]
    completions = [row[name] for row in rows.rows for name in ("chosen", "rejected")]
    assert reward(prompts=prompts, completions=completions) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_adapter_merged_into_the_weights_scores_the_same(config, folder):
    settings = config(lora_rank=2, learning_rate=3e-2, merge_adapter=True, eval_rows=0)
    trainer = Reward(str(folder), PAIRS, settings).train()
    reward = reward_model(str(trainer.run.directory / "final"))
    assert not isinstance(reward.model, PeftModel)
    ids = torch.tensor([[3, 32, 43, 33, 1, 4, 9, 1]])
    with torch.no_grad():
        expected = trainer.policy.model(input_ids=ids).logits
        torch.testing.assert_close(reward.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert "pipeline_tag: text-classification" in (trainer.run.directory / "final" / "README.md").read_text()


def test_training_goes_on_from_a_reward_model(trained, config):
    again = Reward(str(trained.run.directory / "final"), PAIRS, config(steps=1)).train()
    before = trained.run.records()[-1]
    assert again.run.records()[0]["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-4)


def test_rows_that_are_too_long_are_left_out_and_counted(config, folder, capsys):
    rows = [*PAIRS, {"prompt": "long?", "chosen": "a" * 60, "rejected": "b"}]
    trainer = Reward(str(folder), rows, config(max_length=40))
    assert "1 rows left out: longer than max_length" in capsys.readouterr().err
    assert len(trainer.train_rows) + len(trainer.held_out) == len(PAIRS)


def test_point_by_point_on_the_same_pairs(config, folder):
    trainer = Reward(str(folder), PAIRS, config(loss="bce", steps=40, rows_per_step=8)).train()
    last = trainer.run.records()[-1]
    assert last["eval/accuracy"] > 0.9
    assert last["eval/accuracy_low"] < last["eval/accuracy"]
    assert last["eval/loss"] < 0.5


def test_a_process_model_learns_steps(config, folder):
    rows = [
        {"prompt": f"{i}?", "completions": ["aa", "bb"][:: 1 - 2 * (i % 2)], "labels": [i % 2 == 0, i % 2]}
        for i in range(24)
    ]
    trainer = Reward(str(folder), rows, config(loss="process", steps=30, rows_per_step=8, eval_rows=6)).train()
    assert trainer.run.records()[-1]["eval/accuracy"] == 1.0
    reward = reward_model(str(trainer.run.directory / "final"))
    scores = row_scores(trainer.policy.model, trainer.train_rows.judged, 999)
    assert trainer.policy.note.mean == pytest.approx(sum(map(min, scores)) / len(scores), rel=1e-4)
    good, bad = reward(prompts=["5?"] * 2, completions=["aa", "aa\nbb"])
    assert good > 0 > bad


def test_grpo_learns_from_a_reward_model_mixed_with_a_function(trained, folder, tmp_path):
    def short(completions, **kwargs):
        return [-len(completion) / 100 for completion in completions]

    rows = [{"prompt": f"{i}+{i % 3}?"} for i in range(12)]
    spec = f"model:{trained.run.directory / 'final'}(normalize=True)"
    config = GRPOConfig(
        out=tmp_path / "run", steps=8, prompts_per_step=4, group_size=8, max_tokens=6, eval_rows=3, threads=1,
        precision="float32", learning_rate=1e-2, kl_coefficient=0.01,
    )  # fmt: skip
    records = GRPO(str(folder), rows, [spec, short], config).train().run.records()
    assert {"rewards/reward_model/mean", "rewards/short/mean", "kl"} <= records[1].keys()
    assert records[-1]["eval/rewards/reward_model/mean"] > records[0]["eval/rewards/reward_model/mean"] + 0.3


def test_a_run_names_its_reward_models_by_their_whole_path(trained, monkeypatch):
    from taurl.llm.algorithms.setup import whole_spec

    monkeypatch.chdir(trained.run.directory)
    assert whole_spec("model:final(normalize=True)") == f"model:{trained.run.directory / 'final'}(normalize=True)"
    assert whole_spec("model:owner/name") == "model:owner/name"


def test_a_judge_refuses_what_is_longer_than_its_context(trained):
    reward = reward_model(str(trained.run.directory / "final"))
    message = "completion 2 of 2: 7 tokens of its prompt and 131 of its own are more than the 128 that reward model"
    with pytest.raises(InputError, match=message):
        reward(prompts=["1+1?"] * 2, completions=["a", "a" * 130])


def test_what_is_no_reward_model_is_refused(folder, trained, tmp_path, config):
    with pytest.raises(
        InputError, match=r"is no reward model \(it is LlamaForCausalLM\); train one with taurl llm reward"
    ):
        RewardSet([f"model:{folder}"])
    with pytest.raises(InputError, match="no such model folder"):
        RewardSet(["model:./nowhere"])
    with pytest.raises(InputError, match="not understood: expected model:runs/NAME/final"):
        RewardSet(["model:"])
    with pytest.raises(InputError, match="gives scores, it is a reward model; give a language model"):
        load_model(trained.run.directory / "final", dtype=torch.float32)
    bare = tmp_path / "bare"
    trained.policy.export(bare)
    (bare / "taurl_reward.json").unlink()
    with pytest.raises(InputError, match="does not know the mean and deviation"):
        RewardSet([f"model:{bare}(normalize=True)"])
    with pytest.raises(InputError, match="LlamaForCausalLM gives no scores"):
        Reward(tiny_model(), PAIRS, config(), tokenizer=tiny_tokenizer())
    thirds = [{"prompt": str(i), "completion": "a", "label": i % 3} for i in range(20)]
    with pytest.raises(InputError, match="labels run from 0 to 2; bce expects them between 0 and 1"):
        Reward(str(folder), thirds, config(loss="bce"))
    halves = [{"prompt": str(i), "completion": "a", "label": i / 2} for i in range(20)]
    with pytest.raises(InputError, match=r"a label is 0.5; ordinal expects whole numbers"):
        Reward(str(folder), halves, config(loss="ordinal"))
    with pytest.raises(ValueError, match="compares no pairs"):
        config(loss="mse", centering=0.1)


def test_an_object_with_an_adapter_resumes_though_the_head_that_it_does_not_use_is_drawn_anew(config, folder):
    def judge(seed):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    settings = config(lora_rank=2, lora_targets=("q_proj",))
    trained = Reward(judge(1), PAIRS, settings).train()
    resumed = Reward.resume(trained.run.directory, model=judge(2), dataset=PAIRS)
    before, after = (dict(one.policy.model.named_parameters()) for one in (trained, resumed))
    assert all(torch.equal(before[name], weight) for name, weight in after.items() if weight.requires_grad)


def test_what_a_row_gives_its_template_reaches_the_judge(folder, tmp_path):
    template = "{{ tools[0]['name'] if tools else '' }}" + TEMPLATE
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    reward = reward_model(judge, tokenizer=tokenizer)
    tools = [{"name": "add"}]
    with_tools, without = reward(prompts=["1?"] * 2, completions=["a"] * 2, tools=[tools, None])
    assert with_tools != without
    reader = PreferenceReader("pairs", Conversations(tokenizer), 64)
    rows = reader.read([{"prompt": "1?", "chosen": "a", "rejected": "b", "tools": tools}])
    assert with_tools == pytest.approx(row_scores(judge, rows.judged, 999)[0][0], rel=1e-5)


def test_a_judge_from_elsewhere_reads_prompts_as_it_is_told(folder):
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    reward = reward_model(judge, tokenizer=tiny_tokenizer(), prompt_format="text")
    ids = torch.tensor([[*tiny_tokenizer()("1?a")["input_ids"], 1]])
    with torch.no_grad():
        expected = float(judge(input_ids=ids).logits[0, 0])
    assert reward(prompts=["1?"], completions=["a"]) == [pytest.approx(expected, rel=1e-5)]
    with pytest.raises(InputError, match=r"prompt_format is .*'auto', 'chat' or 'text'"):
        reward_model(judge, tokenizer=tiny_tokenizer(), prompt_format="txt")


def test_a_judge_stays_in_this_process_beside_functions_that_do_not(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    judge = reward_model(model, tokenizer=tiny_tokenizer())
    rewards = RewardSet([judge, "last_number"], worker_process=True)
    try:
        assert rewards.models == [judge.model]
        columns = {"answer": ["1"]}
        given = {"prompts": ["1?"], "completions": ["1"], "completion_ids": [[5]], "columns": columns}
        values = rewards(**given, trainer_state=SimpleNamespace(global_step=0, max_steps=1)).values
    finally:
        rewards.close()
    assert values[0, 1] == 1
    assert values[0, 0] == judge(prompts=["1?"], completions=["1"])[0]
    with pytest.raises(InputError, match=r"reward_timeout is 1 s, .*reward models stay in this one"):
        RewardSet([judge], timeout=1, worker_process=True)


def test_labels_that_are_shares_have_the_figures_of_labels(config, folder):
    rows = [{"prompt": f"{i}?", "completion": "a" * (1 + i % 3), "label": (i % 4) / 3} for i in range(12)]
    trainer = Reward(str(folder), rows, config(loss="bce", eval_rows=4, steps=1)).train()
    assert {"eval/accuracy", "eval/auc", "eval/calibration_error"} <= trainer.run.records()[-1].keys()
    assert (trainer.run.directory / "artifacts" / "calibration.svg").exists()


def test_of_more_than_two_classes_none_is_drawn_as_a_probability(config, folder):
    rows = [{"prompt": f"{i}?", "completion": "a" * (1 + i % 3), "label": 2 if i == 0 else i % 2} for i in range(12)]
    held_out = [{"prompt": f"{i}+?", "completion": "b", "label": i % 2} for i in range(4)]
    trainer = Reward(str(folder), rows, config(loss="ordinal", steps=1), eval_dataset=held_out).train()
    assert "eval/rank_correlation" in trainer.run.records()[-1]
    assert not (trainer.run.directory / "artifacts" / "calibration.svg").exists()
