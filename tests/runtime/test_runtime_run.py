"""The run directory in one process: what it refuses, what it writes, and how it goes on."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from counting_algorithm import Counting, CountingConfig, new, resumed, without_times

from taurl.runtime.checkpoints import checkpoint_steps, load_checkpoint
from taurl.runtime.config import read_config, validated
from taurl.runtime.directory import read_environment
from taurl.runtime.errors import InputError, Interrupted, RunError
from taurl.runtime.metrics import read_lines
from taurl.runtime.run import Run
from taurl.runtime.seeding import random_states, restore_random_states, seed_everything


def line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def weights(directory, step):
    return load_checkpoint(directory / "checkpoints", step)[0]


def assert_same_end(one, other, step):
    """Metrics but their times, samples, and the last checkpoint's tensors are the same to the bit."""
    records = [without_times(read_lines(out / "metrics.jsonl")) for out in (one, other)]
    assert records[0] == records[1]
    assert [record["step"] for record in records[0]] == list(range(step + 1))
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    left, right = weights(one, step), weights(other, step)
    assert left.keys() == right.keys() == {"optimizer", "counter"}
    for group, named in left.items():
        assert named.keys() == right[group].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, right[group][name]), name


def test_what_a_run_leaves_behind(tmp_path):
    out = tmp_path / "runs" / "one"
    trainer = new(out, steps=3, save_every=2, keep_checkpoints=1)
    assert not out.exists()  # nothing before begin
    records = [*trainer.steps()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {"seconds", "time/sample", "time/step", "loss"} <= trainer.run.records()[1].keys()
    found = {path.relative_to(out).as_posix().split("/events")[0] for path in out.rglob("*") if path.is_file()}
    assert found == {
        *("config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "tensorboard"),
        *(f"checkpoints/step-000003/{name}" for name in ("manifest.json", "state.pt")),
        *(f"checkpoints/step-000003/{name}.safetensors" for name in ("optimizer", "counter")),
    }
    stored = validated(CountingConfig, yaml.safe_load((out / "config.yaml").read_text()), source="x")
    assert stored == trainer.run.config
    assert stored.out == out
    environment = json.loads((out / "environment.json").read_text())
    assert environment["algorithm"] == "counting"
    assert {"torch", "numpy", "transformers", "taurl", "python", "platform", "cpu", "command"} <= environment.keys()
    assert environment["threads"] == 1
    seconds = [record["seconds"] for record in trainer.run.records()]
    assert seconds == sorted(seconds)
    assert trainer.run.elapsed() >= seconds[-1]


def test_a_directory_of_its_own_name_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Run.start(CountingConfig(), algorithm="counting", headline={})
    assert run.directory.parts[0] == "runs"
    assert run.directory.name.startswith("counting-20")
    assert run.config.out == run.directory
    run.begin()
    run.close()
    assert f"run directory: {run.directory}" in capsys.readouterr().err
    new(tmp_path / "named", steps=1).train()
    assert "run directory" not in capsys.readouterr().err


def test_runs_without_a_name_that_begin_together_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20261127")
    first, second = (Run.start(CountingConfig(steps=1), algorithm="counting", headline={}) for _ in range(2))
    assert first.directory == second.directory  # nothing is written before they begin
    for run in (first, second):
        Counting(run).train()
        assert read_config(run.directory, CountingConfig).out == run.directory
        assert (run.directory / "final").is_dir()
    assert [run.directory.name for run in (first, second)] == ["counting-20261127", "counting-20261127-2"]


def test_a_directory_that_exists_is_refused(tmp_path):
    new(tmp_path / "run", steps=1).train()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "config.yaml").write_text("steps: 1\n")
    for name, expected in {
        "run": "exists already, a run; resume it, or give another directory with out",
        "failed": "exists already, a run without a step yet; resume it, remove it if it has failed, or give",
        "file": "exists already, a file, or give another",
        "other": "exists already, a directory with files in it, or give another",
    }.items():
        with pytest.raises(InputError) as error:
            new(tmp_path / name)
        assert line(error).startswith(f"{tmp_path / name} ")
        assert expected in line(error)
    new(tmp_path / "empty", steps=1).train()
    assert (tmp_path / "empty" / "config.yaml").exists()


def test_a_directory_that_cannot_be_made_or_was_taken_meanwhile(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be created") as error:
        new(tmp_path / "file" / "run", steps=1).train()
    line(error)
    first, second = new(tmp_path / "run", steps=1), new(tmp_path / "run", steps=1)
    first.train()
    with pytest.raises(InputError, match="exists already"):
        second.train()


def test_callbacks_get_each_record(tmp_path):
    trainer = new(tmp_path / "run", steps=3)
    seen = []
    trainer.run.callbacks = [seen.append, lambda record: seen.append(record["step"])]
    trainer.train()
    assert seen[1::2] == [0, 1, 2, 3]
    assert seen[0::2] == trainer.run.records()


@pytest.mark.parametrize(("short", "given_back"), [(0.0, 3), (60.0, 0)])
def test_memory_is_given_back_after_each_step_that_is_not_short(tmp_path, monkeypatch, short, given_back):
    calls = []
    monkeypatch.setattr("taurl.runtime.step.SHORT", short)
    monkeypatch.setattr("taurl.runtime.step.give_back_free_memory", lambda: calls.append(1))
    new(tmp_path / "run", steps=3).train()
    assert len(calls) == given_back


class Broken(Exception):
    pass


def break_at(trainer, step, error=Broken):
    def before_update(number):
        if number == step:
            raise error

    trainer.before_update = before_update
    return trainer


@pytest.mark.parametrize("broken_at", [1, 2, 5])
def test_a_step_that_fails_loses_nothing_finished(tmp_path, broken_at):
    """Whatever the saving interval, what was finished is checkpointed before the error goes on its way."""
    new(tmp_path / "whole", steps=7).train()
    with pytest.raises(Broken):
        break_at(new(tmp_path / "run", steps=7), broken_at).train()
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == ([broken_at - 1] if broken_at > 1 else [])
    resumed(tmp_path / "run").train()
    assert_same_end(tmp_path / "run", tmp_path / "whole", 7)


@pytest.mark.parametrize("broken_at", [1, 3])
def test_a_run_that_fails_leaves_what_its_steps_have_made(tmp_path, capsys, broken_at):
    final = tmp_path / "run" / "final"
    with pytest.raises(Broken):
        break_at(new(tmp_path / "run", steps=7), broken_at).train()
    said = f"what 2 steps have made is in {final}" in capsys.readouterr().err
    assert (final.exists(), said) == (broken_at > 1, broken_at > 1)


def test_a_resumed_run_that_fails_at_once_leaves_its_result_as_it_was(tmp_path):
    new(tmp_path / "run", steps=2).train()
    (tmp_path / "run" / "final" / "count").write_text("whole")
    with pytest.raises(Broken):
        break_at(resumed(tmp_path / "run", steps=5), 3).train()
    assert (tmp_path / "run" / "final" / "count").read_text() == "whole"


def test_a_result_so_far_that_cannot_be_written_hides_no_failure(tmp_path):
    trainer = break_at(new(tmp_path / "run", steps=7), 3)

    def write(folder):
        folder.mkdir()
        raise MemoryError

    trainer.write = write
    with pytest.raises(Broken):
        trainer.train()
    assert not [path for path in (tmp_path / "run").iterdir() if "final" in path.name]


def test_a_callback_that_fails_loses_nothing_finished(tmp_path):
    def callback(record):
        if record["step"] == 3:
            raise Broken("at step 3")

    new(tmp_path / "whole", steps=5).train()
    trainer = new(tmp_path / "run", steps=5)
    trainer.run.callbacks = [callback]
    with pytest.raises(Broken):
        trainer.train()
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [3]
    assert read_environment(tmp_path / "run")["ended"] == "Broken: at step 3"
    resumed(tmp_path / "run").train()
    assert "ended" not in read_environment(tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole", 5)


def test_a_checkpoint_that_was_refused_is_not_said_to_be_saved(tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise RunError("disk full")

    monkeypatch.setattr("taurl.runtime.run.save_checkpoint", refused)
    with pytest.raises(RunError, match="disk full"):
        new(tmp_path / "run", steps=5, save_every=2).train()
    assert "are saved" not in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(Broken):
        break_at(new(tmp_path / "saved", steps=5, save_every=1), 3).train()
    assert f"the steps up to 2 are saved; go on with --resume {tmp_path / 'saved'}" in capsys.readouterr().err


def test_a_rescue_that_fails_does_not_hide_what_failed_before(tmp_path, monkeypatch, capsys):
    def exhausted(*_, **__):
        raise MemoryError("out of memory")

    trainer = break_at(new(tmp_path / "run", steps=5), 3)
    monkeypatch.setattr("taurl.runtime.run.save_checkpoint", exhausted)
    with pytest.raises(Broken):
        trainer.train()
    assert "the steps up to 2 are not saved: out of memory" in capsys.readouterr().err


def test_a_state_in_the_middle_of_a_step_is_not_saved_and_that_is_said(tmp_path, capsys):
    trainer = new(tmp_path / "run", steps=5, save_every=2)

    def change_and_fail(number):
        if number == 4:
            with trainer.optimizer.update(0.1):
                pass
            raise Broken

    trainer.before_update = change_and_fail
    with pytest.raises(Broken):
        trainer.train()
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]
    said = "".join(capsys.readouterr().err.split())
    assert f"what3steps,andapartofthenext,havemadeisin{tmp_path / 'run' / 'final'}" in said
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    assert f"thestepsupto3arenotsaved:theonethatfailedhadchangedthestatealready;thelastgoodcheckpointis{last}" in said


def test_losses_that_are_not_finite_stop_the_run_after_the_good_steps_were_saved(tmp_path):
    trainer = new(tmp_path / "run", steps=9, stop_after_non_finite=2)

    def poison(number):
        if number == 4:
            trainer.model[1].weight.data[0, 0] = float("nan")

    trainer.before_update = poison
    with pytest.raises(RunError, match="2 times in a row"):
        trainer.train()
    records = trainer.run.records()
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[4]["loss"] is None
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [4]
    assert int(weights(tmp_path / "run", 4)["optimizer"]["non_finite_in_a_row"]) == 1


def test_leaving_gives_signals_and_terminal_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = break_at(new(tmp_path / "run", steps=3), 2)
    with pytest.raises(Broken) as kept:  # which keeps the generator's frame alive
        trainer.train()
    assert kept.value
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not trainer.run.view.live.is_started


def test_a_loop_that_is_left_can_be_taken_up_again(tmp_path):
    new(tmp_path / "whole", steps=5).train()
    trainer = new(tmp_path / "run", steps=5)
    for record in trainer.steps():
        if record["step"] == 2:
            break
    assert "ended" not in read_environment(tmp_path / "run")
    trainer.train()
    assert_same_end(tmp_path / "run", tmp_path / "whole", 5)


def test_a_run_that_was_interrupted_is_taken_up_again_from_python(tmp_path):
    trainer = new(tmp_path / "run", steps=4)
    trainer.run.callbacks = [lambda record: record["step"] == 2 and os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(Interrupted):
        trainer.train()
    assert read_environment(tmp_path / "run")["ended"].startswith("SIGTERM: stopped after step 2 of 4")
    assert (tmp_path / "run" / "final" / "count").read_text() == "2"
    trainer.train()
    assert trainer.run.step == 4
    assert (tmp_path / "run" / "final" / "count").read_text() == "4"
    assert "ended" not in read_environment(tmp_path / "run")


@pytest.mark.parametrize("save_every", [0, 1, 2])
def test_resuming_with_more_steps(tmp_path, save_every):
    new(tmp_path / "whole", steps=6).train()
    new(tmp_path / "run", steps=3, save_every=save_every).train()
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"started": "2020-01-02T03:04:05"}))
    trainer = resumed(tmp_path / "run", steps=6)
    assert trainer.run.step == 3
    trainer.train()
    assert_same_end(tmp_path / "run", tmp_path / "whole", 6)
    assert json.loads(file.read_text())["started"] == "2020-01-02T03:04:05"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 6
    seconds = [record["seconds"] for record in trainer.run.records()]
    assert seconds == sorted(seconds)


def test_what_was_chosen_is_carried(tmp_path):
    trainer = new(tmp_path / "run", steps=1)
    trainer.run.chosen.update(precision="bfloat16", slots=8)
    trainer.train()
    again = resumed(tmp_path / "run", steps=2).run
    assert again.chosen == {"precision": "bfloat16", "slots": 8}
    assert again.environment["algorithm"] == "counting"


def test_a_finished_run_resumed_says_so_and_stays_as_it_is(tmp_path, capsys):
    out = tmp_path / "run"
    new(out, steps=3).train()
    before = {name: (out / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "config.yaml")}
    capsys.readouterr()
    assert [*resumed(out).steps()] == []
    assert (
        capsys.readouterr().err
        == f"{out}: all 3 steps are taken already, its result is written again; raise steps to go on\n"
    )
    assert before == {name: (out / name).read_bytes() for name in before}
    assert checkpoint_steps(out / "checkpoints") == [3]


def test_resuming_without_a_checkpoint_begins_again_and_says_so(tmp_path, capsys):
    new(tmp_path / "whole", steps=4).train()
    trainer = new(tmp_path / "run", steps=4)
    for record in trainer.steps():
        if record["step"] == 2:
            break
    again = resumed(tmp_path / "run")
    assert again.run.step == 0
    assert "no checkpoint was written yet, so the run begins again" in " ".join(capsys.readouterr().err.split())
    again.train()
    assert_same_end(tmp_path / "run", tmp_path / "whole", 4)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.pt", "manifest.json"])
def test_of_damaged_checkpoints_the_one_before_is_used_and_said(tmp_path, capsys, name):
    out = tmp_path / "run"
    new(tmp_path / "whole", steps=8).train()
    new(out, steps=6, save_every=2, keep_checkpoints=3).train()
    for step, content in ((6, b""), (4, b"garbage")):
        (out / "checkpoints" / f"step-{step:06d}" / name).write_bytes(content)
    capsys.readouterr()
    trainer = resumed(out, steps=8, keep_checkpoints=1)
    said = capsys.readouterr().err.splitlines()
    assert [text.rpartition("; ")[2] for text in said] == ["going on from the checkpoint before, step 2"] * 2
    for text, step in zip(said, (6, 4), strict=True):
        assert text.startswith(str(out / "checkpoints" / f"step-{step:06d}" / name))
    for record in trainer.steps():  # keeping one checkpoint, it must never be a damaged one
        if record["step"] == 3:
            assert checkpoint_steps(out / "checkpoints") == [2]
    assert_same_end(out, tmp_path / "whole", 8)


def test_no_whole_checkpoint_left_is_an_error_and_leaves_the_metrics(tmp_path):
    out = tmp_path / "run"
    new(out, steps=2).train()
    metrics = (out / "metrics.jsonl").read_bytes()
    (out / "checkpoints" / "step-000002" / "state.pt").unlink()
    with pytest.raises(RunError, match=r"no whole checkpoint is left: remove .*checkpoints to begin again") as error:
        resumed(out)
    assert "state.pt: missing" in line(error)
    assert (out / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_rate": 0.5}, "learning_rate was 1e-05 and cannot become 0.5 on resume"),
        ({"seed": 1, "steps": 9}, "seed was 0 and cannot become 1 on resume"),
        ({"threads": 3}, "threads was None and cannot become 3 on resume"),
        ({"labels": {"a": 2}}, "labels was {'a': [1]} and cannot become {'a': 2} on resume"),
        ({"out": Path("elsewhere")}, "a resumed run stays where it is, but out is elsewhere"),
        ({"steps": 2}, "steps is 2, but 3 are taken already"),
    ],
)
def test_changing_the_past_is_refused_by_name(tmp_path, change, expected):
    new(tmp_path / "run", steps=3, labels={"a": (1,)}).train()
    with pytest.raises(InputError) as error:
        resumed(tmp_path / "run", **change)
    assert line(error).startswith(f"{tmp_path / 'run'}: {expected}")


def test_settings_that_leave_the_past_alone_may_change(tmp_path):
    new(tmp_path / "run", steps=2, labels={"a": (1,)}).train()
    config = CountingConfig(steps=3, save_every=1, keep_checkpoints=5, pause=0.001, labels={"a": (1,)})
    run = Run.resume(tmp_path / "run", config, headline={})
    assert run.config == config.model_copy(update={"out": tmp_path / "run"})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_steps_under_a_schedule_that_spreads_over_them(tmp_path, schedule):
    new(tmp_path / "run", steps=2, schedule=schedule).train()
    with pytest.raises(
        InputError, match=rf"steps was 2 and cannot become 3: what spreads over all steps \(schedule {schedule}\)"
    ):
        resumed(tmp_path / "run", steps=3)


def test_a_run_that_was_moved(tmp_path):
    new(tmp_path / "old", steps=2).train()
    (tmp_path / "old").rename(tmp_path / "new")
    resumed(tmp_path / "new", steps=3).train()
    assert not (tmp_path / "old").exists()
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["out"] == str(tmp_path / "new")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    new(tmp_path / "run", steps=2).train()
    trainer = resumed(tmp_path / "run", steps=3)
    trainer.optimizer.masters["0.weight"] = torch.zeros(9, 9)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"0.weight has shape \(4, 3\) in the checkpoint and \(9, 9\)"):
        trainer.train()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_an_environment_that_is_no_json(tmp_path):
    new(tmp_path / "run", steps=1).train()
    (tmp_path / "run" / "environment.json").write_text("{")
    with pytest.raises(InputError, match=r"environment.json: cannot be read as a JSON object"):
        resumed(tmp_path / "run", steps=2)


def test_tensorboard_after_a_resume_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    new(out, steps=6, save_every=2, keep_checkpoints=9).train()
    for step in (6, 4):
        (out / "checkpoints" / f"step-{step:06d}" / "state.pt").unlink()
    resumed(out).train()
    assert len([*(out / "tensorboard").iterdir()]) == 2
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    records = {record["step"]: record["loss"] for record in read_lines(out / "metrics.jsonl") if "loss" in record}
    assert len(events.Scalars("loss")) == 6
    assert shown == pytest.approx(records)
    assert [event.step for event in events.Scalars("eval/count")] == [0]


def draws():
    return [random.random(), random.gauss(0, 1), *np.random.standard_normal(3), *torch.randn(3).tolist()]


def test_a_gpu_that_is_not_in_use_has_no_random_state(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("a context was started"))
    assert random_states()["cuda"] == []


def test_random_states_go_on(tmp_path):
    seed_everything(5)
    first = draws()
    random.gauss(0, 1), np.random.standard_normal()  # each of which keeps a second one in store
    torch.save(random_states(), tmp_path / "states.pt")
    expected = draws()
    seed_everything(5)
    assert draws() == first
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draws() == expected


def test_large_seeds():
    for seed in (2**32 + 1, 2**63 - 1):
        seed_everything(seed)
        first = draws()
        seed_everything(seed)
        assert draws() == first
