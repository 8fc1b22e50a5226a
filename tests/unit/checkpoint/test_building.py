from __future__ import annotations

import shutil

import pytest

from shardforge.checkpoint import building
from shardforge.core.errors import CheckpointError


@pytest.mark.parametrize("output", ["a", "a/b", "."])
def test_folders_in_one_another_are_refused(tmp_path, output):
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="lie in one another"):
        building.apart(tmp_path / "a", tmp_path / output)


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path):
    (tmp_path / "b").write_text("")
    with pytest.raises(CheckpointError, match="this is a file"):
        building.apart(tmp_path / "a", tmp_path / "b")


def test_too_little_room_is_told_in_both_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    building.room(1 << 20, tmp_path, "")
    with pytest.raises(CheckpointError, match=r"needs 2.00 MiB and the disk has 1.00 MiB left"):
        building.room(2 << 20, tmp_path, "")


def test_one_folder_is_claimed_once_at_a_time(tmp_path):
    with building.claimed(tmp_path / "work", tmp_path, {"a": 1}, "thing"):
        again = building.claimed(tmp_path / "work", tmp_path, {"a": 1}, "thing")
        with pytest.raises(CheckpointError, match="another process"), again:
            pass
    with building.claimed(tmp_path / "work", tmp_path, {"a": 1}, "thing"):
        pass


def test_an_unfinished_one_of_something_else_names_the_difference(tmp_path):
    with building.claimed(tmp_path / "work", tmp_path, {"options": {"k": 1}}, "thing"):
        pass
    other = building.claimed(tmp_path / "work", tmp_path, {"options": {"k": 2}}, "thing")
    with pytest.raises(CheckpointError, match=r"unfinished thing(.|\n)*k: 1 there, 2 here"), other:
        pass


def test_a_full_disk_gets_a_next_step(tmp_path):
    with pytest.raises(CheckpointError, match="No space left") as found, building.told(tmp_path):
        raise OSError(28, "No space left on device")
    assert "free space" in found.value.fix
