"""What runs of a tiny policy share."""

import pytest
from tiny_policy import save_tiny_policy


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny policy with its tokenizer. Tests that write to a model's folder make one of their own."""
    return save_tiny_policy(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(request, tmp_path):
    """Makes a config of the test file's `CONFIG`, with its `SETTINGS` and those of the call."""
    tiny = {"out": tmp_path / "run", "threads": 1, "precision": "float32", "learning_rate": 3e-3}
    module = request.module

    def make(**changes):
        return module.CONFIG(**(tiny | module.SETTINGS | changes))

    return make
