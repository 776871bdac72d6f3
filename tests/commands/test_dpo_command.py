"""`taurl llm dpo` on a tiny model: what it leaves, what it shows, and what it says when something is wrong."""

import json

import pytest

from taurl.cli import main


@pytest.fixture
def words(here, monkeypatch):
    """The words of a small run: options by name."""
    monkeypatch.setenv("TAURL_CACHE", str(here / "cache"))
    pairs = [{"prompt": f"{i}+1?", "chosen": str(i + 1), "rejected": f"no {i}"} for i in range(10)]
    (here / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def make(**changes):
        options = {
            "model": "model",
            "dataset": "pairs.jsonl",
            "steps": 3,
            "prompts_per_step": 3,
            "eval_rows": 3,
            "learning_rate": 3e-3,
            "out": "run",
            "threads": 1,
            "precision": "float32",
        } | changes
        named = ((f"--{name.replace('_', '-')}", str(value).split()) for name, value in options.items())
        return ["llm", "dpo", *(word for name, values in named for word in (name, *values))]

    return make


def test_a_run_leaves_its_files_shows_before_and_after_and_draws_its_curves(here, words, capsys):
    assert main(words(loss_type="sigmoid sft", loss_weights="1 0.1")) == 0
    captured = capsys.readouterr()
    for text in (
        "held-out rows",
        "before (step 0)",
        "after (step 3)",
        "accuracies",
        "logps/chosen",
        "run/final",
    ):
        assert text in captured.out
    assert "computing the reference's log-probabilities of 3 rows once" in captured.err
    assert "held-out accuracy" in captured.err
    assert (here / "run/final/model.safetensors").exists()
    page = (here / "run/report.html").read_text()
    for title in ("Told apart", "Margin", "Rewards", "Log-probabilities"):
        assert f">{title}<" in page


def test_resume_with_more_steps_equals_a_longer_run(here, words):
    assert main(words(out="long", steps=4)) == 0
    assert main(words(steps=2)) == 0
    assert main(["llm", "dpo", "--resume", "run", "--steps", "4"]) == 0
    weights = "final/model.safetensors"
    assert (here / "run" / weights).read_bytes() == (here / "long" / weights).read_bytes()


def test_online_with_an_adapter(here, words, capsys):
    options = {
        "dataset": "rows.jsonl",
        "rewards": "rewards.py:high_ids",
        "group_size": 3,
        "max_tokens": 5,
        "lora_rank": 2,
    }
    assert main(words(**options)) == 0
    captured = capsys.readouterr()
    assert "high_ids" in captured.out
    assert (here / "run/final/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "rows.jsonl"}, "rows.jsonl: no column 'chosen'"),
        ({"loss_type": "sigmiod"}, "sigmiod"),
        ({"loss_type": "kto sft"}, "kto and apo_zero_unpaired mix with no other loss"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is 0.1, but hinge does not read it"),
        ({"reference": "no/such/model/here"}, "no such model folder: 'no/such/model/here'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(here, words, failing, changes, message):
    assert message in failing(words(**changes), 2)
    assert not (here / "run").exists()
