"""Directories of runs."""

import pytest

from taurl.runtime.directory import claim, unused
from taurl.runtime.errors import InputError


def test_runs_that_begin_in_one_second_have_directories_of_their_own(tmp_path):
    found = []
    for _ in range(3):
        found.append(unused(tmp_path / "ppo-20261124-203453"))
        found[-1].mkdir()
    assert [one.name for one in found] == ["ppo-20261124-203453", "ppo-20261124-203453-2", "ppo-20261124-203453-3"]


def test_of_two_runs_that_were_promised_one_directory_the_second_takes_another(tmp_path):
    promised = unused(tmp_path / "runs" / "ppo")
    assert claim(promised, unnamed=True) == promised
    assert claim(promised, unnamed=True).name == "ppo-2"  # empty as yet, but another's
    assert claim(tmp_path / "named", unnamed=False) == claim(tmp_path / "named", unnamed=False)
    (tmp_path / "named" / "config.yaml").touch()
    with pytest.raises(InputError, match="exists already"):
        claim(tmp_path / "named", unnamed=False)
    (tmp_path / "away").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(InputError, match="cannot be created"):
        claim(tmp_path / "away" / "ppo", unnamed=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="ppo: cannot be created"):
        claim(tmp_path / "file" / "ppo", unnamed=True)
