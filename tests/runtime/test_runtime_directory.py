"""Directories of runs."""

from taurl.runtime.directory import unused


def test_runs_that_begin_in_one_second_have_directories_of_their_own(tmp_path):
    found = []
    for _ in range(3):
        found.append(unused(tmp_path / "ppo-20261124-203453"))
        found[-1].mkdir()
    assert [one.name for one in found] == ["ppo-20261124-203453", "ppo-20261124-203453-2", "ppo-20261124-203453-3"]
