from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

from shardforge.core.errors import LaunchError
from shardforge.train import lock
from shardforge.train.lock import Occupied


def take_and_die(path: Path) -> None:
    lock.take(path)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_taken_directory_is_refused_with_its_owner(tmp_path):
    with lock.take(tmp_path / "lock"), pytest.raises(Occupied) as caught:
        lock.take(tmp_path / "lock")
    assert f"process {os.getpid()} on {socket.gethostname()}" in caught.value.what
    assert caught.value.where == str(tmp_path) and "run_dir=" in caught.value.fix


def test_being_refused_leaves_the_owner_in_the_file(tmp_path):
    with lock.take(tmp_path / "lock"):
        with pytest.raises(Occupied):
            lock.take(tmp_path / "lock")
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_closed_lock_can_be_taken_again(tmp_path):
    lock.take(tmp_path / "lock").close()
    lock.take(tmp_path / "lock").close()


def test_a_killed_owner_holds_nothing(tmp_path):
    owner = multiprocessing.get_context("fork").Process(target=take_and_die, args=(tmp_path / "lock",))
    owner.start()
    owner.join()
    assert owner.exitcode == -signal.SIGKILL
    lock.take(tmp_path / "lock").close()


def test_the_folder_is_made(tmp_path):
    lock.take(tmp_path / "runs" / "x" / "lock").close()
    assert (tmp_path / "runs" / "x").is_dir()


def test_an_owner_that_wrote_nothing_is_unknown(tmp_path):
    with lock.take(tmp_path / "lock"):
        (tmp_path / "lock").write_text("")
        with pytest.raises(Occupied, match="its owner is unknown"):
            lock.take(tmp_path / "lock")


def test_a_place_that_cannot_be_a_folder_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"cannot be a run directory(.|\n)*--set run_dir="):
        lock.take(tmp_path / "file" / "run" / "lock")
