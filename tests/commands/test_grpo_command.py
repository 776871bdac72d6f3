"""`taurl llm grpo` on a tiny model: what it leaves, and what it says when something is wrong."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from processes import Child
from safetensors.torch import load_file

from taurl.cli import main


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_its_files_and_shows_before_and_after(here, words, capsys):
    assert main(words(rewards="rewards.py:high_ids")) == 0
    captured = capsys.readouterr()
    for text in ("before (step 0)", "after (step 3)", "high_ids", "3 steps in ", "run/final", "run/report.html"):
        assert text in captured.out
    answers = [s for s in lines(here / "run/samples.jsonl") if s["kind"] == "evaluation"]
    assert len(answers) == 4  # two held-out rows, before and after
    assert all(s["prompt"] in captured.out for s in answers)
    assert "step 3/3" in captured.err
    found = {path.name for path in (here / "run").iterdir()}
    assert found >= {"config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "final"}
    assert "Traceback" not in captured.err
    assert json.loads((here / "run/environment.json").read_text())["given_from_python"] == []


def test_without_held_out_rows_there_is_no_table(here, words, capsys):
    assert main(words(eval_rows=0)) == 0
    text = capsys.readouterr().out
    assert "before" not in text
    assert text.startswith("3 steps in ")


def test_a_reward_that_applies_to_nothing_is_a_dash_in_the_table(here, words, capsys):
    assert main(words(rewards="rewards.py:nothing_known", steps=1)) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "nothing_known" in line)
    assert row.count("–") == 2


def test_several_rewards_are_shown_with_their_sum(here, words, capsys):
    two = words(steps=1, rewards=None)
    assert main([*two, "--rewards", "rewards.py:high_ids", "rewards.py:judge", "--reward-weights", "0", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(row for row in rows if "reward" in row)[3] == "2.000"
    assert next(row for row in rows if "judge" in row)[3] == "1.000"


def test_resume_with_more_steps_equals_a_longer_run(here, words):
    assert main(words(out="long", steps=4)) == 0
    assert main(words(steps=2)) == 0
    assert main(["llm", "grpo", "--resume", "run", "--steps", "4"]) == 0
    weights = "final/model.safetensors"
    assert (here / "run" / weights).read_bytes() == (here / "long" / weights).read_bytes()
    rewards = [[r.get("reward") for r in lines(here / run / "metrics.jsonl")] for run in ("run", "long")]
    assert rewards[0] == rewards[1]


def test_resuming_a_finished_run_writes_what_is_missing(here, words, capsys):
    assert main(words()) == 0
    (here / "run/final/model.safetensors").unlink()
    before = (here / "run/metrics.jsonl").read_bytes()
    assert main(["llm", "grpo", "--resume", "run"]) == 0
    assert (here / "run/final/model.safetensors").exists()
    assert (here / "run/metrics.jsonl").read_bytes() == before
    assert "all 3 steps are taken already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": "leter_a"}, "no reward function 'leter_a' ships with taurl"),
        ({"rewards": "rewards.py:leter_a"}, "(did you mean letter_a?)"),
        ({"rewards": "absent.py:f"}, "absent.py not found"),
        ({"rewards": None}, "no reward function given; name at least one"),
        ({"model": "modle"}, "model 'modle'"),
        ({"model": None}, "no model given: name one with model"),
        ({"dataset": None}, "no data set given: name one with dataset"),
        ({"dataset": "absent.jsonl"}, "no such data file: 'absent.jsonl'"),
        ({"dataset": "reasoning-gym:chainsum"}, "reasoning-gym has no task 'chainsum'; closest: chain_sum"),
        ({"columns": "question=prompt"}, "rows.jsonl: no column 'question' to rename to 'prompt'"),
        ({"columns": "prompt=words"}, "rows.jsonl: no column 'prompt'; the data has words, answer"),
        ({"columns": "answer=solution", "rewards": "rewards.py:right"}, "'right' needs the column 'answer'"),
        ({"eval_rows": 12}, "eval_rows is 12: cannot hold out 12 of 12 rows"),
        (
            {"max_tokens": 124},
            "rows.jsonl: row 1 of the data: its prompt has 7 tokens; with max_tokens 124 that is more",
        ),
        ({"device": "cuda:7"}, "device is 'cuda:7', which is not usable here"),
        ({"system_prompt": "x", "prompt_format": "text"}, "system_prompt needs a chat template"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(here, words, failing, changes, message):
    assert message in failing(words(**changes), 2)
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl: holds no rows"),
        ('{"prompt": "1"}\n{"prompt": "2"}\n{"prompt": "3\n{"prompt": "4"}\n', "data.jsonl:3: not JSON"),
        ('{"prompt": "1"}\n["2"]\n', 'data.jsonl:2: found ["2"]; expected an object'),
        ('{"prompt": "1"}\n{"prompt": null}\n', "data.jsonl: row 2 of the data: the prompt is None"),
        ('{"prompt": "1"}\n{"prompt": ""}\n', "data.jsonl: row 2 of the data: the prompt is an empty string"),
        ('{"prompt": "%s"}\n' % ("12 " * 60), "data.jsonl: row 1 of the data: its prompt has"),
    ],
)
def test_a_bad_row_is_named_by_its_line(here, words, failing, content, message):
    (here / "data.jsonl").write_text(content)
    assert message.replace("rows.jsonl", "data.jsonl") in failing(words(dataset="data.jsonl", eval_rows=0), 2)


def test_a_row_is_named_by_its_place_in_the_file_whatever_is_held_out(here, words, failing):
    rows = [{"prompt": f"{i}?"} for i in range(20)] + [{"prompt": "1" * 130}]
    (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(3):
        assert "row 21 of the data" in failing(words(dataset="data.jsonl", eval_rows=10, seed=seed), 2)


def test_a_reward_of_the_wrong_count_is_named_and_what_was_computed_stays(here, words, failing):
    line = failing(words(rewards="rewards.py:one_too_few"), 2)
    assert "reward function 'one_too_few' returned 7 values for 8 completions" in line
    (record,) = lines(here / "run/metrics.jsonl")
    assert "eval/reward" in record
    assert len(lines(here / "run/samples.jsonl")) == 2
    assert (here / "run/report.html").exists()


def test_a_reward_that_raises_is_named_with_its_row_and_line(here, words, failing):
    line = failing(words(rewards="rewards.py:division", eval_rows=0), 2)
    assert "reward function 'division' raised ZeroDivisionError: division by zero at " in line
    assert "rewards.py:23; row 4 of the batch of 8, prompt '4+1?', completion '" in line


def test_a_run_directory_that_exists_is_refused(here, words, failing):
    assert main(words(steps=1)) == 0
    before = (here / "run/metrics.jsonl").read_bytes()
    assert failing(words(), 2).startswith("taurl: run exists already")
    assert (here / "run/metrics.jsonl").read_bytes() == before
    (here / "file").write_text("x")
    assert "file exists already" in failing(words(out="file"), 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1),
        ("group_size", 2),
        ("seed", 5),
        ("eval_rows", 3),
        ("eval_dataset", "rows.jsonl"),
        ("stop", "a"),
    ],
)
def test_a_change_that_would_alter_the_past_is_refused_by_name(finished, failing, name, value):
    option = f"--{name.replace('_', '-')}"
    line = failing(["llm", "grpo", "--resume", "run", "--steps", "2", option, str(value)], 2)
    assert f"run: {name} was " in line
    assert "it would alter steps already taken" in line


@pytest.mark.parametrize("folder", ["absent", "model", "."])
def test_resuming_what_is_no_run_is_refused(here, failing, folder):
    assert (
        failing(["llm", "grpo", "--resume", folder], 2)
        == f"taurl: {folder}: not a run directory: config.yaml is missing"
    )


def test_a_run_with_functions_from_python_is_resumed_from_python_only(here, failing):
    from taurl.llm import GRPO, GRPOConfig

    def reward(completions, **kwargs):
        return [float(len(text)) for text in completions]

    config = GRPOConfig(
        out="run", steps=1, prompts_per_step=2, group_size=2, max_tokens=4, eval_rows=0, threads=1, precision="float32"
    )
    GRPO("model", "rows.jsonl", [reward], config).train()
    line = failing(["llm", "grpo", "--resume", "run", "--steps", "2"], 2)
    assert line == "taurl: run: its rewards came from Python as an object; resume from Python and give it again"
    resumed = GRPO.resume(
        "run", GRPOConfig(**(config.model_dump() | {"steps": 2})), model="model", dataset="rows.jsonl", rewards=[reward]
    )
    assert resumed.train().run.step == 2


def test_a_checkpoint_cut_short_is_passed_over_and_said(here, words, capfd):
    assert main(words(out="whole")) == 0
    assert main(words(save_every=1)) == 0
    broken = here / "run/checkpoints/step-000003/optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    capfd.readouterr()
    assert main(["llm", "grpo", "--resume", "run"]) == 0
    notes = " ".join(capfd.readouterr().err.split())
    assert "step-000003/optimizer.safetensors" in notes
    assert "cut short" in notes
    assert "step 2" in notes
    weights = "final/model.safetensors"
    assert (here / "run" / weights).read_bytes() == (here / "whole" / weights).read_bytes()


def test_losses_that_are_not_finite_are_not_taken_and_stop_the_run_after_n(here, words, failing):
    """Advantages of 1e300 are infinite in float32."""
    wild = words(rewards="rewards.py:huge", scale_rewards="none", steps=9, stop_after_non_finite=2, save_every=1)
    line = failing(wild, 1)
    assert "not finite, 2 times in a row (stop_after_non_finite)" in line
    assert [r["updates_skipped"] for r in lines(here / "run/metrics.jsonl") if r["step"]] == [1]
    stored = load_file(here / "run/checkpoints/step-000001/optimizer.safetensors")
    for name, tensor in load_file(here / "model/model.safetensors").items():
        assert torch.equal(stored[f"master/{name}"], tensor)


def test_weights_that_have_diverged_stop_the_run_by_name(here, words, failing):
    line = failing(words(rewards="rewards.py:high_ids", learning_rate=1e30, steps=9, eval_rows=0), 1)
    assert "logits are not finite" in line
    assert "its weights have diverged" in line


def main_with(kind, limit, folder, words):
    """`main` where the files, or the memory beyond what is in use, may grow to this many bytes."""
    os.chdir(folder)
    grown = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if kind == resource.RLIMIT_AS else 0
    resource.setrlimit(kind, (grown + limit,) * 2)
    raise SystemExit(main(words))


def last_line_of_failed(kind, limit, folder, words):
    code, said = Child(main_with, kind, limit, folder, words).wait()
    assert (code, "Traceback" in said) == (1, False), said
    return said.strip().splitlines()[-1]


def test_a_full_disk_leaves_the_last_good_checkpoint(here, words):
    """Files may not grow beyond 200 kB: the tiny model's optimiser state (3 × 52 kB) fits, that of 4 × the size not."""
    assert main(words(steps=2, save_every=1)) == 0
    size = (here / "run/checkpoints/step-000002/optimizer.safetensors").stat().st_size
    more = ["llm", "grpo", "--resume", "run", "--steps", "4"]
    error = last_line_of_failed(resource.RLIMIT_FSIZE, size - 1000, here, more)
    assert error.startswith("taurl: run/checkpoints/step-000003: the checkpoint could not be saved (")
    assert "step-000002" in error
    assert sorted(path.name for path in (here / "run/checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert main(more) == 0


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on address space here")
def test_out_of_memory_names_the_settings_to_lower(here, words):
    """One tensor of 1 GB is refused, and small ones never are: libraries crash where they are."""
    many = words(
        rewards="rewards.py:high_ids",
        prompts_per_step=16,
        group_size=2**14,
        max_tokens=110,
        eval_rows=0,
        slots=2**18,
        tokens_per_part=10**7,
    )
    error = last_line_of_failed(resource.RLIMIT_AS, 2**30, here, many)
    assert error.startswith("taurl: out of memory: lower tokens_per_part or slots")
