"""Checkpoints: whole or not at all, the newest few of them, and what a damaged one says."""

import json
import os
import resource
import signal
from unittest.mock import Mock

import pytest
import torch
from processes import Child

from taurl.runtime.checkpoints import (
    checkpoint_steps,
    discard_leftovers,
    folder,
    last_good,
    load_checkpoint,
    save_checkpoint,
)
from taurl.runtime.errors import InputError, RunError

TENSORS = {
    "optimizer": {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)},  # a is not contiguous
    "other": {"c": torch.tensor([1.5], dtype=torch.bfloat16)},
}
VALUES = {
    "seconds": 1.5,
    "chosen": {"precision": "bfloat16"},
    "random": [torch.tensor([1], dtype=torch.uint8), (1, None)],
}


def save(directory, step, keep=9):
    return save_checkpoint(directory, step, TENSORS, VALUES, keep=keep)


def test_round_trip(tmp_path):
    assert save(tmp_path, 7) == tmp_path / "step-000007"
    tensors, values = load_checkpoint(tmp_path, 7)
    assert {group: set(named) for group, named in tensors.items()} == {"optimizer": {"a", "b"}, "other": {"c"}}
    for group, named in TENSORS.items():
        for name, tensor in named.items():
            assert torch.equal(tensors[group][name], tensor)
            assert tensors[group][name].dtype == tensor.dtype
    assert values == VALUES


def test_a_step_that_is_saved_already_stays_as_it_is(tmp_path):
    manifest = save(tmp_path, 7) / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert save(tmp_path, 7) == manifest.parent
    assert manifest.stat().st_mtime_ns == before


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError("no memory")])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, error):
    save(tmp_path, 7)
    monkeypatch.setattr("taurl.runtime.checkpoints.load_file", Mock(side_effect=error))
    with pytest.raises(InputError, match=r"safetensors: cannot be read \(.*\); resume when it can"):
        load_checkpoint(tmp_path, 7)


def test_only_the_newest_stay(tmp_path):
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert checkpoint_steps(tmp_path) == [999_999, 1_000_000]
    assert sorted(os.listdir(tmp_path)) == ["step-1000000", "step-999999"]


def test_steps_of_no_directory_and_of_one_with_other_things(tmp_path):
    assert checkpoint_steps(tmp_path / "none") == []
    (tmp_path / "step-notes").mkdir()
    (tmp_path / ".partial-000003").mkdir()
    save(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [2]
    assert last_good(tmp_path) == f"the last good checkpoint is {tmp_path / 'step-000002'}"
    assert last_good(tmp_path / "none") == "there is no checkpoint yet"


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def same_size_garbage(path):
    path.write_bytes(b"\x07" * path.stat().st_size)


def test_a_file_cut_short_is_named_with_its_sizes(tmp_path):
    path = save(tmp_path, 3) / "optimizer.safetensors"
    size = path.stat().st_size
    truncate(path)
    with pytest.raises(RunError) as error:
        load_checkpoint(tmp_path, 3)
    assert str(error.value) == f"{path}: {size - 1:,} bytes, expected {size:,}: the file is cut short"


@pytest.mark.parametrize("name", ["optimizer.safetensors", "other.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, same_size_garbage, lambda path: path.write_bytes(b""), os.remove])
def test_any_damage_is_one_line_that_names_the_file(tmp_path, name, damage):
    path = save(tmp_path, 3) / name
    damage(path)
    with pytest.raises(RunError) as error:
        load_checkpoint(tmp_path, 3)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 80


@pytest.mark.parametrize("manifest", [[], {}, {"sizes": None}, {"sizes": {"gone.safetensors": 5}}])
def test_a_manifest_of_another_shape(tmp_path, manifest):
    (save(tmp_path, 3) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"damaged|missing"):
        load_checkpoint(tmp_path, 3)


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 3) / "state.pt"
    torch.save({"x": Payload()}, path)
    sizes = {"state.pt": path.stat().st_size}
    (path.parent / "manifest.json").write_text(json.dumps({"sizes": sizes}))
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(tmp_path, 3)
    assert not (tmp_path / "ran").exists()


def test_leftovers_of_a_killed_run_go(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    (tmp_path / ".partial-000007").mkdir()
    (tmp_path / ".partial-000007" / "optimizer.safetensors").write_bytes(b"half")
    discard_leftovers(tmp_path, after=4)
    assert sorted(os.listdir(tmp_path)) == ["step-000002", "step-000004"]
    discard_leftovers(tmp_path / "none", after=4)


def test_a_partial_folder_of_the_same_step_is_no_part_of_the_next(tmp_path):
    (tmp_path / ".partial-000003").mkdir()
    (tmp_path / ".partial-000003" / "stray.safetensors").write_bytes(b"half")
    save(tmp_path, 3)
    assert set(load_checkpoint(tmp_path, 3)[0]) == {"optimizer", "other"}


def save_with_files_limited_to(limit, directory):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.manual_seed(0)
    save_checkpoint(directory, 2, TENSORS, VALUES, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    large = {"optimizer": {"a": torch.randn(1000)}}  # 4 kB, and state.pt as large
    save_checkpoint(directory, 4, large, {"random": torch.randn(1000)}, keep=1)


@pytest.mark.parametrize("limit", [0, 100, 4000, 4500])
def test_a_full_disk_leaves_the_last_good_one(tmp_path, limit):
    """Files limited to 0 and 100 bytes stop the tensors half way, 4,000 just at their end, 4,500 stops state.pt."""
    code, said = Child(save_with_files_limited_to, limit, tmp_path / "checkpoints").wait()
    assert code == 1
    assert os.listdir(tmp_path / "checkpoints") == ["step-000002"]
    assert load_checkpoint(tmp_path / "checkpoints", 2)[1] == VALUES
    assert said.count("\n") == 1
    assert f"{folder(tmp_path / 'checkpoints', 4)}: the checkpoint could not be saved" in said
    assert "File too large" in said
    assert f"the last good checkpoint is {folder(tmp_path / 'checkpoints', 2)}; free space, then resume" in said
