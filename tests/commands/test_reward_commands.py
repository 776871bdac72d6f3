"""`taurl llm reward` and `taurl llm score` on a tiny model."""

import json

import pytest

from taurl.cli import main

PAIRS = [{"question": f"{i}+1?", "chosen": "a" * (1 + i % 3), "rejected": "bc"} for i in range(12)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(here, capsys):  # which begins before the run, to see what it prints
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    options = "--model model --dataset pairs.jsonl --steps 2 --rows-per-step 4 --eval-rows 4"
    assert main(["llm", "reward", *options.split(), *["--out", "rm", "--threads", "1", "--precision", "float32"]]) == 0
    return here


def test_train_report_resume_score(run, capsys):
    text = capsys.readouterr().out
    for words in ("held-out rows", "accuracy", "before (step 0)", "2 steps in ", "rm/final"):
        assert words in text
    page = (run / "rm/report.html").read_text()
    for words in ("Pair accuracy", "Pair accuracy by margin", 'alt="calibration"', 'alt="scores"'):
        assert words in page
    assert main(["llm", "reward", "--resume", "rm", "--steps", "3"]) == 0
    assert [record["step"] for record in lines(run / "rm/metrics.jsonl")] == [0, 1, 2, 3]
    capsys.readouterr()

    score = ["llm", "score", "--model", "rm/final", "--threads", "1"]
    assert main([*score, "--dataset", "pairs.jsonl", "--out", "scored.jsonl"]) == 0
    assert "accuracy" in capsys.readouterr().err
    pairs = lines(run / "scored.jsonl")
    assert len(pairs) == 12
    assert {"prompt", "chosen", "score_chosen", "score_rejected"} <= pairs[0].keys()

    answers = [{"prompt": "1+1?", "completion": text} for text in ("a", "bc", " ")] + [
        {"prompt": "2+1?", "completion": "a"}
    ]
    (run / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert main([*score, "--dataset", "answers.jsonl", "--normalize"]) == 0
    captured = capsys.readouterr()
    scored = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["completion"] for row in scored] == ["a", "bc", " ", "a"]
    assert main([*score, "--dataset", "answers.jsonl"]) == 0
    plain = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    scale = json.loads((run / "rm/final/taurl_reward.json").read_text())
    normalized = [(one - scale["mean"]) / scale["deviation"] for one in plain]
    assert [row["score"] for row in scored] == pytest.approx(normalized, abs=1e-5)
    assert main([*score, "--dataset", "answers.jsonl", "--best"]) == 0
    best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in best] == ["1+1?", "2+1?"]
    raw = sorted(scored[:3], key=lambda row: row["score"])
    assert best[0]["completion"] == raw[-1]["completion"]

    (run / "lists.jsonl").write_text(json.dumps({"prompt": "0+1?", "completions": ["a", "bc"]}) + "\n")
    assert main([*score, "--dataset", "lists.jsonl"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["scores"] == pytest.approx([pairs[0]["score_chosen"], pairs[0]["score_rejected"]], rel=1e-3)


def test_what_is_wrong_is_said_in_one_line(here, failing):
    assert "no column 'chosen'" in failing(["llm", "reward", "--model", "model", "--dataset", "rows.jsonl"], 2)
    assert "no dataset given" in failing(["llm", "score", "--model", "model"], 2)
    line = failing(["llm", "score", "--model", "model", "--dataset", "rows.jsonl"], 2)
    assert "rows.jsonl: no completions; the data has prompt, answer" in line
    (here / "answers.jsonl").write_text('{"prompt": "a", "completion": 3}\n')
    line = failing(["llm", "score", "--model", "model", "--dataset", "answers.jsonl"], 2)
    assert "answers.jsonl: row 1 of the data: a completion is 3 (int)" in line
    (here / "answers.jsonl").write_text('{"prompt": "a", "completion": "b", "score": 1}\n')
    line = failing(["llm", "score", "--model", "model", "--dataset", "answers.jsonl"], 2)
    assert "the data has a column score already: keep it as --columns score=another_name" in line
    (here / "pairs.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    line = failing(["llm", "score", "--model", "model", "--dataset", "pairs.jsonl", "--best"], 2)
    assert "best chooses between rows of one completion each" in line
    (here / "answers.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    line = failing(["llm", "score", "--model", "model", "--dataset", "answers.jsonl"], 2)
    assert "is no reward model" in line


def test_pairs_whose_prompt_nobody_gave_are_scored_as_raw_text_alone(run, capsys, failing):
    (run / "bare.jsonl").write_text(json.dumps({"chosen": "1+1? a", "rejected": "1+1? b"}) + "\n")
    score = ["llm", "score", "--model", "rm/final", "--threads", "1", "--dataset", "bare.jsonl"]
    assert "bare.jsonl: row 1 of the data has no prompt" in failing(score, 2)
    capsys.readouterr()
    assert main([*score, "--prompt-format", "text"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (row["prompt"], row["chosen"]) == ("1+1?", " a")
