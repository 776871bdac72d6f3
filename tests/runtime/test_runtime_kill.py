"""Processes that are killed, signalled or run out of disk, and what resuming makes of it."""

import os
import random
import resource
import signal
import time

import pytest
from counting_algorithm import lines_of, new, resumed, start_or_resume, wait_for_lines
from processes import Child
from test_runtime_run import assert_same_end

from taurl.runtime.checkpoints import checkpoint_steps
from taurl.runtime.metrics import read_lines

STEPS = 30
SETTINGS = {"steps": STEPS, "save_every": 3, "learning_rate": 0.01, "pause": 0.01}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed, in a process of its own like the others."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert Child(start_or_resume, out, SETTINGS).wait()[0] == 0
    return out


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_instant_and_resumed_it_ends_the_same(tmp_path, whole, seed):
    out, generator = tmp_path / "run", random.Random(seed)
    kills = 0
    for killed_after in sorted(generator.sample(range(1, STEPS - 4), 6)):
        child = Child(start_or_resume, out, SETTINGS)
        # The first kills fall on a run without a checkpoint; those soon after a resume may fall on its beginning.
        wait_for_lines(out / "metrics.jsonl", killed_after)
        time.sleep(generator.uniform(0, 0.02))
        child.signal(signal.SIGKILL)
        code, _ = child.wait()
        kills += code == -signal.SIGKILL
    assert kills >= 5
    code, said = Child(start_or_resume, out, SETTINGS).wait()
    assert (code, "Traceback" in said) == (0, False)
    assert_same_end(out, whole, STEPS)
    assert not [*(out / "checkpoints").glob(".partial*")]
    assert len(checkpoint_steps(out / "checkpoints")) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, whole, number, code):
    out = tmp_path / "run"
    child = Child(start_or_resume, out, {**SETTINGS, "save_every": 0})
    wait_for_lines(out / "metrics.jsonl", 4)
    child.signal(number)
    found, said = child.wait()
    assert found == code
    last = read_lines(out / "metrics.jsonl")[-1]["step"]
    assert 3 <= last < STEPS
    assert checkpoint_steps(out / "checkpoints") == [last]
    name = signal.Signals(number).name
    expected = f"taurl: {name}: stopped after step {last} of {STEPS}; go on with --resume {out}"
    assert said.splitlines()[-1] == expected
    assert Child(start_or_resume, out, SETTINGS).wait()[0] == 0
    assert_same_end(out, whole, STEPS)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_is_obeyed_at_once(tmp_path, number, code):
    out = tmp_path / "run"
    child = Child(start_or_resume, out, {"steps": 3, "pause": 3000})
    wait_for_lines(out / "metrics.jsonl", 1)
    time.sleep(0.2)  # into the first step
    child.signal(number)
    child.wait_for("finishing the step")  # two at once would be one
    child.signal(number)
    assert child.wait()[0] == code  # long before the step would have ended
    assert not (out / "checkpoints").exists()
    assert not (out / "final").exists()


def unread(out):
    """The reader of standard error goes away before the run has said anything."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)
    new(out, **SETTINGS).train()


def test_a_run_that_nobody_reads_goes_on(tmp_path, whole):
    assert Child(unread, tmp_path / "run").wait()[0] == 0
    assert_same_end(tmp_path / "run", whole, STEPS)


def signalled_between_steps(out):
    """The signal comes in the caller's loop, when the step has been finished and was not saved."""
    trainer = new(out, **{**SETTINGS, "save_every": 0})
    for record in trainer.steps():
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_between_two_steps_saves_too(tmp_path, whole):
    out = tmp_path / "run"
    code, said = Child(signalled_between_steps, out).wait()
    assert (code, "stopped after step 5" in said) == (143, True)
    assert "are saved" not in said  # it was no failure that had to be rescued
    assert checkpoint_steps(out / "checkpoints") == [5]
    assert Child(start_or_resume, out, SETTINGS).wait()[0] == 0
    assert_same_end(out, whole, STEPS)


def limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_disk_at_a_checkpoint(out, file, settings):
    trainer = new(out, **settings)

    def callback(record):
        if record["step"] == 11:  # from here on there is room for the lines, but not for this file as it was at step 9
            limit_files((out / "checkpoints" / "step-000009" / file).stat().st_size - 1)

    trainer.run.callbacks = [callback]
    trainer.train()


@pytest.mark.parametrize(("file", "width"), [("optimizer.safetensors", 4000), ("state.pt", 4)])
def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(tmp_path, file, width):
    out, settings = tmp_path / "run", {**SETTINGS, "steps": 15, "width": width, "pause": 0}
    code, said = Child(full_disk_at_a_checkpoint, out, file, settings).wait()
    assert code == 1
    checkpoints = out / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["step-000006", "step-000009"]
    error = said.splitlines()[-1]
    assert error.startswith(f"taurl: {checkpoints / 'step-000012'}: the checkpoint could not be saved (")
    assert "File too large" in error
    assert error.endswith(f"; the last good checkpoint is {checkpoints / 'step-000009'}; free space, then resume")
    assert "Traceback" not in said
    assert said.count("could not be saved") == 1  # it is not tried, nor said, again
    start_or_resume(out, {})
    new(tmp_path / "whole", **settings).train()
    assert_same_end(out, tmp_path / "whole", 15)


def full_disk_for_lines(out, file, settings):
    trainer = new(out, **settings)

    def callback(record):
        if record["step"] == 7:
            limit_files((out / file).stat().st_size + 10)  # the next line is cut

    trainer.run.callbacks = [callback]
    trainer.train()


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_while_logging_is_one_line_and_resumes(tmp_path, file):
    out, settings = tmp_path / "run", {**SETTINGS, "steps": 12, "pause": 0}
    code, said = Child(full_disk_for_lines, out, file, settings).wait()
    assert code == 1
    assert "Traceback" not in said
    error = said.splitlines()[-1]
    assert error.startswith(f"taurl: {out / file}: could not be written (File too large); the last good checkpoint is ")
    assert error.endswith("; free space, then resume")
    assert not (out / file).read_bytes().endswith(b"\n")
    start_or_resume(out, {})
    new(tmp_path / "whole", **settings).train()
    assert_same_end(out, tmp_path / "whole", 12)


def test_a_step_of_another_thread_leaves_signals_alone(tmp_path):
    from threading import Thread

    before = signal.getsignal(signal.SIGINT)
    thread = Thread(target=lambda: new(tmp_path / "run", steps=2).train())
    thread.start()
    thread.join()
    assert lines_of(tmp_path / "run" / "metrics.jsonl") == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert resumed(tmp_path / "run", steps=3).run.step == 2
