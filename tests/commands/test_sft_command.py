"""`taurl llm sft` on a tiny model: what it leaves, and what it says when something is wrong."""

import json

import pytest

from taurl.cli import main


def sft_words(**changes):
    """The words of a small run: options by name, None to leave one out, True for one without a value."""
    options = {
        "model": "model",
        "dataset": "answers.jsonl",
        "steps": 3,
        "rows_per_step": 2,
        "eval_rows": 2,
        "learning_rate": 3e-3,
        "out": "run",
        "threads": 1,
        "precision": "float32",
    }
    options |= changes
    words = ["llm", "sft"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


@pytest.fixture
def rows(here):
    """Additions with what answers them."""
    lines = (json.dumps({"prompt": f"{i}+{i}?", "completion": f"{2 * i}", "answer": str(2 * i)}) for i in range(12))
    (here / "answers.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return here


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_shows_before_and_after(rows, capsys):
    assert main(sft_words(eval_every=1)) == 0
    captured = capsys.readouterr()
    for text in ("before (step 0)", "after (step 3)", "perplexity", "mean_token_accuracy", "3 steps in "):
        assert text in captured.out
    assert "answers" not in captured.out
    found = {path.name for path in (rows / "run").iterdir()}
    assert found >= {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "final", "best", "report.html"}
    page = (rows / "run/report.html").read_text()
    for chart in ("Held-out loss", "Perplexity", "Token accuracy", "Tokens per second", "Gradient norm"):
        assert chart in page
    assert "step 3/3" in captured.err


def test_epochs_and_answers_from_the_command_line(rows, capsys):
    words = sft_words(steps=None, epochs=0.5, generate_rows=2, rewards="rewards.py:right", max_tokens=4)
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "reward 0." in captured.out or "reward 1." in captured.out
    assert "step 3/3" in captured.err  # half of ten rows, two a step
    assert "eval/rewards/right/mean" in records(rows / "run")[-1]


def test_resume_with_more_steps_equals_a_longer_run(rows):
    assert main(sft_words(out="long", steps=4)) == 0
    assert main(sft_words(steps=2)) == 0
    assert main(["llm", "sft", "--resume", "run", "--steps", "4"]) == 0
    weights = "final/model.safetensors"
    assert (rows / "run" / weights).read_bytes() == (rows / "long" / weights).read_bytes()
    losses = [[record.get("loss") for record in records(rows / run)] for run in ("run", "long")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no model given: name one with model"),
        ({"dataset": None}, "no data set given: name one with dataset"),
        ({"dataset": "absent.jsonl"}, "no such data file: 'absent.jsonl'"),
        ({"dataset": "rows.jsonl"}, "rows.jsonl: row 1"),
        ({"eval_rows": 12}, "eval_rows is 12: cannot hold out 12 of 12 rows"),
        ({"freeze": "lm_haed*"}, "freeze is 'lm_haed*', which no weight's name matches; one of them is lm_head.weight"),
        ({"load_in_4bit": True, "lora_rank": 2, "device": "cpu"}, "load_in_4bit needs a GPU with CUDA"),
        ({"rewards": "last_number"}, "rewards score answers to held-out rows: give generate_rows"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "label_smoothing goes with loss_type nll"),
        ({"steps": 0, "streaming": True, "eval_rows": 0}, "epochs cannot be counted: give steps"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(rows, failing, changes, message):
    assert message in failing(sft_words(**changes), 2)
    assert not (rows / "run").exists()


def test_a_run_of_another_algorithm_is_not_resumed(rows, failing):
    assert main(sft_words(steps=1)) == 0
    assert "a run of sft, not of grpo" in failing(["llm", "grpo", "--resume", "run"], 2)
