"""Promise 3 with real signals: a run that is killed at any moment and resumed equals one that never was."""

import json
import os
import signal
import time

from processes import Child

from taurl.cli import main

STEPS = 16
# Timings, and what depends on the process rather than on the run.
UNLIKE = ("seconds", "time/", "tokens_per_second", "memory/")


def command(folder, words):
    os.chdir(folder)
    raise SystemExit(main(words))


def start(words):
    return Child(command, os.getcwd(), words)


def records(run):
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line, half written
            break
    return found


def stop_at(child, run, step, number, delay=0.0):
    """Send a signal once metrics.jsonl has a step; returns exit code and what was printed."""
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in records(run)):
        assert child.process.exitcode is None, child.wait()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    child.signal(number)
    return child.wait()


def comparable(run):
    return [{k: v for k, v in r.items() if not any(part in k for part in UNLIKE)} for r in records(run)]


def test_killed_terminated_and_interrupted_runs_resume_bit_for_bit(here, words):
    """bfloat16 weights with float32 masters, a schedule, two updates a step, a KL term, evaluations on the way."""
    settings = {
        "rewards": "rewards.py:slow_high_ids",
        "steps": STEPS,
        "precision": "bfloat16",
        "schedule": "cosine",
        "warmup_steps": 3,
        "minibatches": 2,
        "kl_coefficient": 0.05,
        "learning_rate": 1e-2,
        "eval_every": 5,
        "save_every": 2,
    }
    assert main(words(**settings, out="whole")) == 0

    run = here / "run"
    resume = ["llm", "grpo", "--resume", "run"]
    code, _ = stop_at(start(words(**settings)), run, 0, signal.SIGKILL)  # before there is a checkpoint
    assert code == -signal.SIGKILL
    code, _ = stop_at(start(resume), run, 6, signal.SIGKILL)  # while a checkpoint is written, or nearly
    assert code == -signal.SIGKILL

    code, errors = stop_at(start(resume), run, 9, signal.SIGTERM, delay=0.05)
    assert code == 143
    last = records(run)[-1]["step"]
    assert errors.strip().endswith(f"taurl: SIGTERM: stopped after step {last} of {STEPS}; go on with --resume run")
    assert (run / "checkpoints" / f"step-{last:06d}").is_dir()
    assert (run / "final" / "model.safetensors").is_file()  # of so many steps
    code, errors = stop_at(start(resume), run, 12, signal.SIGINT)
    assert code == 130
    assert "taurl: SIGINT: stopped after step" in errors
    assert "Traceback" not in errors

    assert start(resume).wait()[0] == 0
    assert comparable(run) == comparable(here / "whole")
    assert [r["step"] for r in records(run)] == list(range(STEPS + 1))
    for name in ("final/model.safetensors", f"checkpoints/step-{STEPS:06d}/optimizer.safetensors"):
        assert (run / name).read_bytes() == (here / "whole" / name).read_bytes()
    assert (run / "samples.jsonl").read_bytes() == (here / "whole/samples.jsonl").read_bytes()
