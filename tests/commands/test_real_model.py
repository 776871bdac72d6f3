"""The main job's command on SmolLM2-135M-Instruct itself, as short as it gets, with an adapter (a small checkpoint)."""

import json

import pytest

from taurl.cli import main


@pytest.mark.model
def test_the_main_job_takes_a_step_and_its_result_answers(here, capsys):
    task = ["--dataset", "reasoning-gym:chain_sum", "--dataset-args", "min_terms=2", "max_terms=2", "size=40"]
    sizes = (
        "--steps 1 --prompts-per-step 4 --group-size 8 --max-tokens 8 --eval-rows 2 --lora-rank 2 --threads 1 --out run"
    )
    train = [
        "llm",
        "grpo",
        "--model",
        "smollm2-135m-instruct",
        *task,
        "--rewards",
        "last_number",
        "rewards.py:high_ids",
        *sizes.split(),
    ]
    assert main(train) == 0
    before, step = (json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines())
    assert 0 <= before["eval/rewards/last_number/mean"] <= 1
    assert 0 < step["entropy"] < 5  # a trained model: uniform would be 10.8
    precision = json.loads((here / "run/environment.json").read_text())["precision"]
    assert step["sampling/logp_difference_mean"] < {"float32": 1e-3, "bfloat16": 0.05}[precision]
    assert step["updates_skipped"] == 0
    (here / "prompts.jsonl").write_text(
        json.dumps({"prompt": "What is the capital of Japan?"})
    )  # by far the likeliest answer
    capsys.readouterr()
    assert (
        main(
            [
                "llm",
                "generate",
                "--model",
                "run/final",
                "--prompts",
                "prompts.jsonl",
                "--max-tokens",
                "12",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    assert "Tokyo" in json.loads(capsys.readouterr().out)["completion"]
