import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))  # tiny_policy lives there

REWARDS = '''
import time

def letter_a(completions, **kwargs):
    """Share of the letter a."""
    return [completion.count("a") / max(1, len(completion)) for completion in completions]

def high_ids(completion_ids, **kwargs):
    """Differs within nearly every group."""
    return [sum(ids) / len(ids) for ids in completion_ids]

def slow_high_ids(completion_ids, **kwargs):
    time.sleep(0.1)
    return high_ids(completion_ids)

def right(prompts, completions, answer, **kwargs):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

def one_too_few(completions, **kwargs):
    return letter_a(completions)[: -1 if len(completions) == 8 else None]

def division(completions, answer, trainer_state, **kwargs):
    return [1 / (int(wanted) - 5) for wanted in answer]

def huge(completion_ids, **kwargs):
    return [1e300 * value for value in high_ids(completion_ids)]

def nothing_known(completions, **kwargs):
    return [None] * len(completions)

async def judge(completions, **kwargs):
    return [1.0] * len(completions)
'''


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with model/, rows.jsonl and rewards.py."""
    from tiny_policy import save_tiny_policy, write_rows

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_policy(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A working folder of its own that sees model, rows.jsonl and rewards.py under these names."""
    linked(tiny, tmp_path, monkeypatch)
    return tmp_path


def linked(tiny, folder, monkeypatch):
    """Work in this folder, which gets links to model, rows.jsonl and rewards.py."""
    for path in tiny.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)


def grpo_words(**changes):
    """The words of a small run: options by name, None to leave one out."""
    options = {
        "model": "model",
        "dataset": "rows.jsonl",
        "rewards": "rewards.py:letter_a",
        "steps": 3,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_tokens": 6,
        "eval_rows": 2,
        "learning_rate": 3e-3,
        "out": "run",
        "threads": 1,
        "precision": "float32",
    }
    options |= changes
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None)
    return ["llm", "grpo", *(word for pair in pairs for word in pair)]


@pytest.fixture
def words():
    return grpo_words


@pytest.fixture(scope="session")
def finished_folder(tiny, tmp_path_factory):
    """Where a run of one step lies, for tests that change nothing in it."""
    from taurl.cli import main

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        linked(tiny, folder, patch)
        assert main(grpo_words(steps=1)) == 0
    return folder


@pytest.fixture
def finished(finished_folder, monkeypatch):
    """Works in that folder."""
    monkeypatch.chdir(finished_folder)


@pytest.fixture
def failing(capsys):
    """Runs a command that must fail with this exit code, in one line on standard error; returns the line.

    Notes of a run that had begun may stand before it.
    """
    from taurl.cli import main

    def run(words, code):
        capsys.readouterr()
        assert main(words) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("taurl: ")]
        assert len(errors) == 1, captured.err
        assert captured.err.rstrip().endswith(errors[0])  # and nothing after it
        return errors[0]

    return run
