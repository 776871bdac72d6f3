"""Synchronous reward functions in a real worker process."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from taurl.llm.rewards import RewardSet
from taurl.runtime.errors import InputError

FILE = """
import multiprocessing, os, signal, subprocess, time

calls = 0

def process(completions, log_metric, log_extra, trainer_state):
    global calls
    calls += 1
    log_metric("calls", calls)
    log_metric("at_step", trainer_state.global_step)
    log_extra("text", [text.upper() for text in completions])
    return [os.getpid()] * len(completions)

def obeys(completions):
    if "hang" in completions:
        time.sleep(60)
    if "die" in completions:
        os._exit(9)
    if "interrupt" in completions:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    return [None if text == "none" else {}[text] if text == "raise" else 1 for text in completions]

def sleeps(ready):
    ready.set()
    time.sleep(60)

def starts(completions):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=sleeps, args=(ready,))
    child.start()
    ready.wait()
    child.terminate()
    child.join()
    program = subprocess.Popen(["sleep", "60"])
    program.terminate()
    return [child.exitcode if text == "child" else program.wait() for text in completions]

def leaves(completions):
    program = subprocess.Popen(["sleep", "600"])
    with open("left.txt", "w") as file:
        file.write(str(program.pid))
    time.sleep(60 if "hang" in completions else 0)
    return [0.0] * len(completions)

def unsendable(completions, log_extra):
    log_extra("functions", [lambda: None for _ in completions])
    return [0.0] * len(completions)

def never(completions):
    with open(os.environ["PID_FILE"], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture
def rewards_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(FILE)
    return tmp_path / "my_rewards.py"


@pytest.fixture
def make():
    sets = []

    def build(*arguments, **options):
        sets.append(RewardSet(*arguments, worker_process=True, **options))
        return sets[-1]

    yield build
    for one in sets:
        one.close()


class TrainerState:
    """Unpicklable, as a trainer that holds open files is."""

    global_step, max_steps = 5, 9

    def __reduce__(self):
        raise TypeError("a trainer cannot be pickled")


def score(reward_set, *completions):
    return reward_set(
        prompts=["question"] * len(completions),
        completions=list(completions),
        completion_ids=None,
        columns={"answer": ["7"] * len(completions)},
        trainer_state=TrainerState(),
    )


async def here(completions):
    return [float(os.getpid())] * len(completions)


def test_functions_run_in_one_other_process_which_keeps_its_state(make, rewards_file):
    reward_set = make(["my_rewards.py:process", "last_number", "my_rewards.py:obeys", here], timeout=120)
    first, second = score(reward_set, "7", "none"), score(reward_set, "7", "interrupt")
    process = first.values[0, 0]
    assert process not in (os.getpid(), 0)
    np.testing.assert_array_equal(first.values, [[process, 1, 1, os.getpid()], [process, 0, np.nan, os.getpid()]])
    assert first.metrics == {"calls": 1.0, "at_step": 5.0}
    assert second.metrics == {"calls": 2.0, "at_step": 5.0}
    assert second.values[0, 0] == process
    assert first.extra == {"text": ["7", "NONE"]}


def test_failures_there_are_named_here_and_the_next_call_works(make, rewards_file):
    reward_set = make(["my_rewards.py:obeys", "my_rewards.py:process"], timeout=2)
    process = score(reward_set, "fine").values[0, 1]

    with pytest.raises(InputError) as caught:
        score(reward_set, "fine", "raise")
    assert f"'obeys' raised KeyError: 'raise' at {rewards_file}:" in str(caught.value)
    assert "row 1 of the batch of 2, prompt 'question', completion 'raise'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "in obeys" in str(caught.value.__cause__)  # the other process's traceback, for --debug
    assert score(reward_set, "fine").values[0, 1] == process

    with pytest.raises(InputError, match=r"'obeys' took longer than timeout=2 seconds"):
        score(reward_set, "fine", "hang")
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
    restarted = score(reward_set, "fine").values[0, 1]
    assert restarted != process

    with pytest.raises(InputError, match=r"'obeys' ended its worker process \(exit code 9\)$"):
        score(reward_set, "die")
    assert score(reward_set, "fine").values[0, 1] != restarted


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_functions_start_processes_there_and_end_them(make, rewards_file):
    values = score(make(["my_rewards.py:starts"], timeout=60), "child", "program").values
    assert values[:, 0].tolist() == [-signal.SIGTERM, -signal.SIGTERM]


@pytest.mark.parametrize("end", ["close", "timeout"])
def test_what_functions_have_started_ends_with_the_process(make, rewards_file, end):
    reward_set = make(["my_rewards.py:leaves"], timeout=5)
    if end == "close":
        score(reward_set, "fine")
        reward_set.close()
    else:
        with pytest.raises(InputError, match="took longer than timeout=5 seconds"):
            score(reward_set, "hang")
    left = int((rewards_file.parent / "left.txt").read_text())
    deadline = time.monotonic() + 20
    while is_running(left):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_close_stops_the_process(make, rewards_file):
    reward_set = make(["my_rewards.py:process"])
    process = int(score(reward_set, "x").values[0, 0])
    reward_set.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    reward_set.close()


def test_values_that_cannot_come_back_are_named(make, rewards_file):
    with pytest.raises(InputError, match="'unsendable' could not exchange values with its worker process"):
        score(make(["my_rewards.py:unsendable"]), "x")


def test_rows_that_cannot_be_sent_are_named(make):
    reward_set = make(["last_number"])
    with pytest.raises(InputError, match="'last_number' cannot be given its rows in the worker process"):
        reward_set(
            prompts=["?"],
            completions=["7"],
            completion_ids=None,
            columns={"answer": ["7"], "helper": [lambda: None]},
            trainer_state=SimpleNamespace(global_step=0, max_steps=1),
        )


def test_a_function_that_pickle_refuses_is_refused_at_once(make):
    def local(completions): ...

    with pytest.raises(InputError, match=r"'local' cannot be sent to a worker process .*path/to/file.py:function"):
        make([local])


def test_a_function_of_the_script_itself_works(tmp_path):
    """And the process does not keep the script from ending, though nobody closes the set."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        from types import SimpleNamespace
        from taurl.llm.rewards import RewardSet

        def length(completions):
            return [len(text) for text in completions]

        if __name__ == "__main__":
            rewards = RewardSet([length], worker_process=True)
            scores = rewards(prompts=["?"], completions=["four"], completion_ids=None, columns={}, trainer_state=None)
            print(scores.total)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("[4.]\n", "")


def test_a_script_without_a_guard_is_told(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        from taurl.llm.rewards import RewardSet

        rewards = RewardSet(["int_reward_func"], worker_process=True)
        rewards(prompts=["?"], completions=["four"], completion_ids=None, columns={}, trainer_state=None)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.stderr.rstrip().endswith("must do so under `if __name__ == '__main__':`")


def test_a_hanging_function_does_not_outlive_a_killed_run(tmp_path):
    (tmp_path / "my_rewards.py").write_text(FILE)
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        from taurl.llm.rewards import RewardSet

        if __name__ == "__main__":
            rewards = RewardSet(["my_rewards.py:never"], worker_process=True)
            rewards(prompts=["?"], completions=["x"], completion_ids=None, columns={}, trainer_state=None)
        """)
    )
    pid_file = tmp_path / "pid"
    run = subprocess.Popen([sys.executable, script], cwd=tmp_path, env={**os.environ, "PID_FILE": str(pid_file)})
    try:
        assert before_long(lambda: pid_file.exists() and pid_file.read_text())
        worker = int(pid_file.read_text())
        assert is_running(worker)
    finally:
        run.kill()
        run.wait()
    assert before_long(lambda: not is_running(worker))


def before_long(condition):
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
