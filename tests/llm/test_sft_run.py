"""SFT from Python: what is trained, what is kept, what is refused."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_policy import tiny_model, tiny_tokenizer, untimed
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from taurl.llm import SFT, SFTConfig
from taurl.llm.data.chat import prompt_text
from taurl.llm.models.loading import load_model
from taurl.report import write_report
from taurl.runtime.errors import InputError

ROWS = [{"prompt": f"{i}+{i % 3}?", "completion": str(i + i % 3), "answer": str(i + i % 3)} for i in range(14)]
CONFIG = SFTConfig
SETTINGS = {
    "steps": 4,
    "rows_per_step": 3,
    "eval_rows": 4,
}


# --- learning and evaluation


def test_it_learns_its_rows(config, folder):
    rows = [{"prompt": f"{i}?", "completion": "yes" if i % 2 else "no"} for i in range(40)]
    trainer = SFT(str(folder), rows, config(steps=60, rows_per_step=8, learning_rate=1e-2, eval_rows=8)).train()
    records = trainer.run.records()
    assert records[1]["nll"] > 2
    assert records[-1]["nll"] < 0.5
    assert records[-1]["mean_token_accuracy"] > 0.8
    assert records[-1]["eval/loss"] < 0.5 * records[0]["eval/loss"]
    assert records[1]["loss"] == pytest.approx(records[1]["nll"])


def test_held_out_figures_equal_those_of_a_loop(config, folder):
    trainer = SFT(str(folder), ROWS, config())
    figures = trainer.evaluate()
    model = tiny_model()
    losses, right = [], []
    for row in trainer.data.held_out.token_rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0]
        for place in range(1, len(row.ids)):
            if row.trained[place]:
                losses.append(-float(logits[place - 1].log_softmax(0)[row.ids[place]]))
                right.append(int(logits[place - 1].argmax()) == row.ids[place])
    assert figures["eval/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert figures["eval/perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert figures["eval/mean_token_accuracy"] == pytest.approx(sum(right) / len(right))
    with pytest.raises(InputError, match="no held-out rows to evaluate on: give eval_rows or eval_dataset"):
        SFT(str(folder), ROWS, config(eval_rows=0)).evaluate()


def test_epochs_set_the_steps_where_these_are_not_given(config, folder):
    trainer = SFT(str(folder), ROWS, config(steps=0, epochs=2)).train()
    rows = len(ROWS) - 4
    assert trainer.run.config.steps == trainer.run.step == math.ceil(2 * rows / 3)
    assert trainer.run.records()[-1]["epoch"] == pytest.approx(7 * 3 / rows)
    with pytest.raises(InputError, match=r"epochs was 2\.0 and cannot become 3\.0 on resume: .*; raise steps instead$"):
        SFT.resume(trainer.run.directory, trainer.config.model_copy(update={"epochs": 3.0}), dataset=ROWS)
    longer = SFT.resume(trainer.run.directory, trainer.config.model_copy(update={"steps": 9}), dataset=ROWS)
    assert longer.train().run.step == 9
    again = config(model=str(folder), steps=0, epochs=2, tokens_per_part=64)  # as the user wrote it
    assert SFT.resume(trainer.run.directory, again, dataset=ROWS).run.config.steps == 9


@pytest.mark.parametrize("changes", [{"max_tokens": 9}, {"stop": ("a",)}, {"reward_weights": (2.0,)}])
def test_settings_of_answers_are_refused_where_none_are_generated(config, folder, changes):
    name = next(iter(changes))
    hint = ".*max_length" if name == "max_tokens" else ""
    with pytest.raises(InputError, match=rf"^{name} is .*generate_rows is 0{hint}"):
        SFT(str(folder), ROWS, config(**changes))


def test_epochs_take_whole_steps(config, folder):
    """1.1 · 100 / 10 is 11, and a little more in floats."""
    settings = config(steps=0, epochs=1.1, rows_per_step=10, eval_rows=0)
    assert SFT(str(folder), (ROWS * 8)[:100], settings).config.steps == 11


def test_tokens_are_counted_without_padding(config, folder):
    trainer = SFT(str(folder), ROWS, config(steps=1, packing=False, rows_per_step=5))
    batch = trainer.data.order.take(5)
    trainer.data.order.load_state_dict({"position": 0})
    (record,) = [record for record in trainer.train().run.records() if record["step"] == 1]
    assert record["tokens"] == sum(len(row.ids) for row in batch)
    assert record["trained_tokens"] == sum(sum(row.trained) for row in batch)


def test_answers_to_held_out_rows_are_scored(config, folder):
    def right(completions, answer, **kwargs):
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    settings = config(generate_rows=3, max_tokens=4, steps=2)
    trainer = SFT(str(folder), ROWS, settings, rewards=right).train()
    first, *_, last = trainer.run.records()
    for record in (first, last):
        assert {"eval/loss", "eval/reward", "eval/rewards/right/mean", "eval/completions/mean_length"} <= record.keys()
    samples = trainer.run.samples()
    assert [(sample["step"], sample["row"]) for sample in samples] == [(s, r) for s in (0, 2) for r in range(3)]
    held_out = trainer.data.held_out.rows[:3]
    assert [sample["prompt"] for sample in samples[:3]] == [row["prompt"] for row in held_out]
    for row, ids in zip(held_out, trainer.answering.ids, strict=True):
        assert tiny_tokenizer().decode(ids) == f"<user>{row['prompt']}<end><assistant>"
    assert trainer.run.chosen["kv_memory_gb"] == trainer.answering.generator.kv_memory_gb
    with pytest.raises(InputError, match="no reward function given"):
        SFT(str(folder), ROWS, config(generate_rows=1, out=None))
    with pytest.raises(InputError, match="held-out row 1 has no question before its answer"):
        SFT(str(folder), [{"text": f"{i}."} for i in range(9)], config(generate_rows=1, out=None), rewards=right)


def test_rewards_that_would_score_nothing_are_refused(config, folder):
    with pytest.raises(InputError, match="rewards score answers to held-out rows: give generate_rows"):
        SFT(str(folder), ROWS, config(), rewards=lambda completions, **_: [0.0] * len(completions))


def test_an_adapter_of_the_embeddings_takes_noise(config, folder):
    settings = config(neftune_alpha=5, lora_rank=2, lora_targets=("embed_tokens",), steps=2)
    assert SFT(str(folder), ROWS, settings).train().run.step == 2


@pytest.mark.parametrize("form", ["strings", "messages of both", "messages"])
def test_without_an_answer_the_completion_is_what_rewards_compare_with(config, folder, form):
    rows = []
    for i in range(9):
        asked, said = [{"role": "user", "content": f"{i}?"}], [{"role": "assistant", "content": f"it is {i}"}]
        rows.append(
            {"messages": [*asked, *said], "prompt": f"ultrachat {i}"}
            if form == "messages"
            else {"prompt": asked, "completion": said}
            if form == "messages of both"
            else {"prompt": f"{i}?", "completion": f"it is {i}"}
        )
    trainer = SFT(str(folder), rows, config(generate_rows=3, eval_rows=4, max_tokens=8), rewards=["last_number"])
    for row in trainer.answering.rows:
        assert prompt_text(row["prompt"]) == row["answer"].removeprefix("it is ") + "?"
    assert len({row["answer"] for row in trainer.answering.rows}) == 3


def test_the_rows_of_a_mixture_that_are_all_held_out_are_named(config, folder, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"b{i}?", "completion": "b"}) + "\n" for i in range(3)))
    with pytest.raises(InputError, match=r"other\.jsonl: no row of it is left to train on"):
        SFT(str(folder), ROWS, config(mix={str(other): 1.0}), eval_dataset=str(other))


def test_a_further_data_set_may_have_its_columns_named_already(config, folder):
    rows = [{"question": f"{i}?", "answer": f"so #### {i}"} for i in range(9)]
    settings = config(columns={"question": "prompt", "answer": "completion"})
    held_out = [{"prompt": f"{i}!", "completion": f"{i}"} for i in range(3)]
    trainer = SFT(str(folder), rows, settings, eval_dataset=held_out)
    assert trainer.data.held_out.rows == held_out


def test_new_tokens_need_embeddings_that_are_trained(config, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    talk = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "1"}]} for i in range(9)
    ]
    with pytest.raises(
        InputError, match=r"freeze holds the embeddings fixed, .* new tokens, <\|im_start\|> <\|im_end\|>"
    ):
        SFT(str(tmp_path / "base"), talk, config(freeze=("*embed_tokens*",)))
    with pytest.raises(InputError, match="freeze holds the output layer fixed"):
        SFT(str(tmp_path / "base"), talk, config(freeze=("lm_head*",)))


@pytest.mark.parametrize(
    ("published", "exported"),
    [
        ({"temperature": 0.9}, {"temperature": 0.9, "do_sample": True}),
        ({"temperature": 0.9, "do_sample": False}, {"temperature": None, "do_sample": False}),
    ],
)
def test_a_generation_config_that_transformers_would_not_save_is_mended(config, tmp_path, published, exported):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(published))
    trainer = SFT(str(tmp_path / "model"), ROWS, config(steps=1)).train()
    stored = json.loads((trainer.run.directory / "final" / "generation_config.json").read_text())
    assert {name: stored.get(name) for name in exported} == exported
    assert stored["eos_token_id"] == 1


def test_epochs_of_a_mixture_are_those_of_the_data_set(config, folder, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"b{i}?", "completion": "b"}) + "\n" for i in range(50)))
    rows = [{"prompt": f"a{i}?", "completion": "a"} for i in range(8)]
    trainer = SFT(str(folder), rows, config(steps=0, epochs=1, eval_rows=0, rows_per_step=4, mix={str(other): 0.25}))
    assert trainer.run.config.steps == math.ceil(8 * 1.25 / 4)


def test_a_split_row_is_asked_its_whole_question(config, folder):
    rows = [{"prompt": f"{i}?", "completion": f"{i}" * 20} for i in range(9)]
    settings = config(generate_rows=2, max_length=8, overlong="split", rewards=("last_number",), max_tokens=8)
    trainer = SFT(str(folder), [row | {"answer": "1"} for row in rows], settings)
    asked = [tiny_tokenizer().decode(ids) for ids in trainer.answering.ids]
    assert asked == [f"<user>{row['prompt']}<end><assistant>" for row in trainer.data.held_out.rows[:2]]


@pytest.mark.parametrize("separate", [False, True])
def test_a_truncated_conversation_is_asked_its_last_question(config, folder, separate):
    talk = [{"role": role, "content": word} for role, word in (("assistant", "22"), ("user", "3?"))]
    rows = [
        {
            "messages": [{"role": "user", "content": f"{i}?"}, *talk, {"role": "assistant", "content": f"{i}" * 20}],
            "answer": "4",
        }
        for i in range(9)
    ]
    settings = {"generate_rows": 2, "max_length": 12, "separate_turns": separate, "rewards": ("last_number",)}
    trainer = SFT(str(folder), rows, config(**settings, max_tokens=8))
    asked = [tiny_tokenizer().decode(ids) for ids in trainer.answering.ids]
    first = [row["messages"][0]["content"] for row in trainer.data.held_out.rows[:2]]
    assert asked == [f"<user>{word}<end><assistant>22<end><user>3?<end><assistant>" for word in first]


def test_questions_that_leave_no_room_are_not_asked(config, folder):
    rows = [{"prompt": "1" * (110 if i % 2 else 5) + f"{i}?", "completion": "2", "answer": "2"} for i in range(12)]
    settings = {"eval_rows": 6, "generate_rows": 6, "rewards": ("last_number",)}
    trainer = SFT(str(folder), rows, config(**settings, max_tokens=20))
    assert 0 < len(trainer.answering.ids) < 6
    assert max(map(len, trainer.answering.ids)) < 20
    with pytest.raises(InputError, match="no held-out question leaves room for max_tokens 127 in the model's context"):
        SFT(str(folder), rows, config(**settings, max_tokens=127, out=None))


def test_only_training_rows_are_counted_as_cut(config, folder):
    rows = [{"prompt": f"{i}?", "completion": "1" * 20} for i in range(9)]
    trainer = SFT(str(folder), rows, config(max_length=16, train_rows=3))
    assert trainer.data.figures()["rows/truncated"] == 3
    trainer = SFT(str(folder), rows, config(max_length=16))
    assert trainer.data.figures()["rows/truncated"] == 9 - 4


def test_the_best_weights_are_kept_and_patience_ends_the_run(config, folder):
    """At a wild rate the held-out loss soon rises."""
    settings = config(steps=30, eval_every=1, patience=3, learning_rate=0.1, rows_per_step=2)
    trainer = SFT(str(folder), ROWS, settings).train()
    losses = [record["eval/loss"] for record in trainer.run.records() if record["step"]]
    best = losses.index(min(losses))
    assert trainer.run.step == len(losses) == best + 1 + 3 < 30
    assert "stopped before its last step: 3 evaluations" in write_report(trainer.run.directory).read_text()
    assert (trainer.run.directory / "final" / "model.safetensors").exists()
    card = (trainer.run.directory / "best" / "README.md").read_text()
    assert f"| loss | {trainer.run.records()[0]['eval/loss']:.4g} | {min(losses):.4g} |" in card
    kept = SFT(str(trainer.run.directory / "best"), ROWS, config(out=None)).evaluate()
    assert kept["eval/loss"] == pytest.approx(min(losses), rel=1e-6)
    resumed = SFT.resume(trainer.run.directory, dataset=ROWS).train()
    assert resumed.run.step == trainer.run.step


def test_a_held_out_loss_that_is_not_finite_is_no_best_one_and_stops_nothing(config, folder, monkeypatch):
    found, real = [], SFT._held_out

    def held_out(self):
        found.append(real(self))
        return found[-1] if len(found) != 3 else {**found[-1], "eval/loss": math.nan, "eval/perplexity": math.nan}

    monkeypatch.setattr(SFT, "_held_out", held_out)
    trainer = SFT(str(folder), ROWS, config(steps=5, eval_every=1, patience=4, rows_per_step=2)).train()
    losses = [record["eval/loss"] for record in trainer.run.records() if record["step"]]
    assert losses[1] is None
    assert trainer.run.step == 5
    assert (trainer.run.directory / "best" / "model.safetensors").exists()


# --- resuming


def interrupted(trainer, steps):
    iterator = trainer.steps()
    for _ in range(steps):
        next(iterator)
    iterator.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_alpha": 5.0},
        {"packing": False, "eval_every": 2, "patience": 9},
        {"streaming": True, "shuffle_window": 4, "steps": 9, "save_every": 3},
        {"lora_rank": 2, "use_dora": True},
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(config, folder, tmp_path, changes):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = config(**({"steps": 5, "save_every": 2} | changes))
    held_out = {"eval_dataset": ROWS[:3]}
    whole = SFT(str(folder), str(rows), settings, **held_out).train().run
    cut = SFT(str(folder), str(rows), settings.model_copy(update={"out": tmp_path / "cut"}), **held_out)
    interrupted(cut, settings.steps - 1)
    resumed = SFT.resume(tmp_path / "cut", **held_out).train().run
    assert untimed(resumed.records()) == untimed(whole.records())
    written = list((whole.directory / "final").glob("*.safetensors"))
    assert written
    for path in written:
        assert (resumed.directory / "final" / path.name).read_bytes() == path.read_bytes()


def test_other_data_on_resume_is_refused(config, folder):
    run = SFT(str(folder), ROWS, config()).train().run
    longer = run.config.model_copy(update={"steps": 5})
    with pytest.raises(InputError, match="the data is not what the run began with"):
        SFT.resume(run.directory, longer, dataset=ROWS[:-1])


# --- which weights, and what is written


def test_the_result_loads_elsewhere_and_says_where_it_comes_from(config, folder):
    trainer = SFT(str(folder), ROWS, config()).train()
    final = trainer.run.directory / "final"
    names = {path.name for path in final.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert AutoTokenizer.from_pretrained(final).chat_template
    assert GenerationConfig.from_pretrained(final).eos_token_id in (1, [1])
    loaded = AutoModelForCausalLM.from_pretrained(final)
    for name, tensor in trainer.policy.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    card = (final / "README.md").read_text()
    last = trainer.run.records()[-1]
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# tiny after SFT" in card
    assert f"{last['eval/loss']:.4g}" in card
    assert str(folder) not in card


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_written_alone_or_merged(config, folder, tmp_path, dora):
    settings = config(lora_rank=2, use_dora=dora, learning_rate=3e-2)
    trainer = SFT(str(folder), ROWS, settings).train()
    final = trainer.run.directory / "final"
    assert (final / "adapter_model.safetensors").exists()
    assert "library_name: peft" in (final / "README.md").read_text()
    stored = load_file(final / "adapter_model.safetensors")
    assert any("magnitude" in name for name in stored) == dora
    ids = torch.tensor([[3, 32, 43, 33, 1, 4]])
    with torch.no_grad():
        expected = trainer.policy.model(ids).logits
        assert isinstance(load_model(final, dtype=torch.float32), PeftModel)
        torch.testing.assert_close(load_model(final, dtype=torch.float32)(ids).logits, expected, atol=1e-5, rtol=0)
        merging = SFT.resume(
            trainer.run.directory, trainer.config.model_copy(update={"merge_adapter": True}), dataset=ROWS
        ).train()
        merged = load_model(final, dtype=torch.float32)
        assert not isinstance(merged, PeftModel)
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=0)
        assert torch.equal(merging.policy.model(ids).logits, expected)  # what is trained is not what was merged


def test_a_base_model_gets_a_template_with_its_tokens_and_stops(config):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(9)
    ]
    trainer = SFT(tiny_model(), rows, config(), tokenizer=tokenizer).train()
    final = trainer.run.directory / "final"
    end = AutoTokenizer.from_pretrained(final).convert_tokens_to_ids("<|im_end|>")
    embeddings = AutoModelForCausalLM.from_pretrained(final).get_input_embeddings()
    assert end < embeddings.num_embeddings
    assert not torch.equal(embeddings.weight[end], embeddings.weight[end - 1])  # both began as the mean
    assert end in GenerationConfig.from_pretrained(final).eos_token_id
    assert tokenizer.chat_template is None  # what was given stays as it was, for another run
    assert end not in tokenizer.get_vocab().values()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_a_base_model_trains_the_new_tokens_and_no_others(config, tmp_path, tied):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(9)
    ]
    settings = config(lora_rank=2, save_every=2)
    trainer = SFT(str(tmp_path / "base"), rows, settings).train()
    start, end = trainer.policy.new_tokens
    result = load_model(trainer.run.directory / "final", dtype=torch.float32)
    assert not isinstance(result, PeftModel)
    ids = torch.tensor([[5, 7, end, start]])
    torch.testing.assert_close(result(ids).logits, trainer.policy.model(ids).logits, atol=1e-5, rtol=0)
    assert end in GenerationConfig.from_pretrained(trainer.run.directory / "final").eos_token_id
    before = tiny_model(tie_word_embeddings=tied)
    for old, new in zip(embeddings_of(before), embeddings_of(result), strict=True):
        assert torch.equal(old, new[: len(old)])
        assert (new[end] - old.mean(dim=0)).abs().max() > 1e-4

    stopped = SFT(str(tmp_path / "base"), rows, settings.model_copy(update={"out": tmp_path / "stopped", "steps": 2}))
    stopped.train()
    longer = stopped.config.model_copy(update={"steps": settings.steps})
    resumed = SFT.resume(tmp_path / "stopped", longer, dataset=rows).train()
    again = load_model(resumed.run.directory / "final", dtype=torch.float32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in result.state_dict().items())

    with pytest.raises(
        InputError, match=r"weight_decay would shrink those of all tokens.*new tokens <.im_start.> <.im_end.>"
    ):
        SFT(str(tmp_path / "base"), rows, config(out=tmp_path / "other", lora_rank=2, weight_decay=0.1))


def embeddings_of(model):
    """The weights of both embedding layers."""
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def test_frozen_weights_stay_and_are_no_part_of_the_optimiser(config, folder):
    trainer = SFT(str(folder), ROWS, config(freeze=("*embed_tokens*", "*.layers.0.*"))).train()
    before, after = tiny_model().state_dict(), trainer.policy.model.state_dict()
    for name, tensor in before.items():
        frozen = "embed_tokens" in name or ".layers.0." in name
        assert torch.equal(tensor, after[name]) == frozen, name
        assert (name in trainer.optimizer.parameters) != frozen


def test_lower_layers_may_learn_more_slowly(config, folder):
    """The first step of AdamW moves every weight by its learning rate."""
    trainer = SFT(str(folder), ROWS, config(steps=1, layer_decay=0.5, learning_rate=1e-3)).train()
    before, after = tiny_model().state_dict(), trainer.policy.model.state_dict()
    expected = {"lm_head": 1, "model.norm": 1, "layers.1.mlp": 0.5, "layers.0.mlp": 0.25, "embed_tokens": 0.125}
    for part, factor in expected.items():
        name = next(name for name in before if part in name)
        moved = float((after[name] - before[name]).abs().max())
        assert moved == pytest.approx(1e-3 * factor, rel=0.02), name


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "the data set is empty"),
        (ROWS[:4], {}, "eval_rows is 4: cannot hold out 4 of 4 rows"),
        (ROWS, {"freeze": ("*.absent",)}, r"freeze is '\*\.absent', which no weight's name matches; one of them is "),
        (ROWS, {"freeze": ("*",)}, r"freeze is \*, which leaves no weight to train"),
        (ROWS, {"lora_rank": 2, "load_in_4bit": True}, "load_in_4bit needs a GPU with CUDA, and the device is cpu"),
        (ROWS, {"eval_rows": None, "generate_rows": 3}, r"generate_rows is 3, more than the held-out rows \(1\)"),
        (
            ROWS[:9],
            {"eval_rows": None, "patience": 1, "eval_every": 1},
            "patience needs held-out rows, and there are none",
        ),
        (ROWS, {"streaming": True}, "a stream is not read ahead to hold rows out: give eval_dataset, or eval_rows 0"),
        (ROWS, {"streaming": True, "eval_rows": 0, "steps": 0}, "epochs cannot be counted: give steps"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(config, folder, rows, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        SFT(str(folder), rows, config(**changes))
    assert "\n" not in str(caught.value)
    assert not config().out.exists()


def test_packing_is_refused_where_attention_is_not_known(config):
    from tiny_models import tiny_model as tiny_of

    model = tiny_of("gemma2")
    with pytest.raises(InputError, match="packing: Gemma2ForCausalLM's attention cannot be held within rows"):
        SFT(model, ROWS, config(packing=True), tokenizer=tiny_tokenizer())
    assert not SFT(model, ROWS, config(), tokenizer=tiny_tokenizer()).packed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 0.1, "loss_type": "dft"}, "label_smoothing goes with loss_type nll"),
        ({"patience": 2}, "patience is 2, which needs eval_every and eval_rows"),
        ({"generate_rows": 1, "mask": "all"}, "generate_rows asks what stands before an answer; with mask all"),
        ({"generate_rows": 9}, "generate_rows 9 exceed eval_rows 4"),
        ({"rewards": ("last_number",)}, "rewards score answers to held-out rows: give generate_rows"),
        ({"train_rows": 3, "mix": {"other.jsonl": 1.0}}, "train_rows counts the rows of one data set"),
        ({"separate_turns": True, "mask": "all"}, "mask all trains on whole conversations"),
        ({"use_dora": True}, r"use_dora needs an adapter: give lora_rank"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
