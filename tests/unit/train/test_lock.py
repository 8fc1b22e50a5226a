from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shardforge.core.errors import LaunchError
from shardforge.train import lock
from shardforge.train.lock import Holder, Lease, Occupied


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


FAR = {"host": "far", "pid": 7, "start": "12.0.1", "machine": "another", "id": "x"}


def left_behind(folder: Path) -> Path:
    """The file of a holder on another machine that never gave it back."""
    path = folder / "lock"
    path.write_text(json.dumps(FAR))
    return path


def beats(path: Path, times: list[float]):
    """A pause in which the holder sets the file's time, as long as there are any left."""

    def pause(seconds: float) -> None:
        if times:
            os.utime(path, (times[0], times.pop(0)))

    return pause


def test_a_holder_that_beats_on_another_machine_is_respected(tmp_path):
    path = left_behind(tmp_path)
    with pytest.raises(Occupied, match="process 7 on far") as caught:
        lock.take(path, beats(path, [1000.0]))
    assert caught.value.owner == "12.0.1" and json.loads(path.read_text()) == FAR


def test_its_beat_may_come_as_late_as_the_stated_time(tmp_path):
    path, waited = left_behind(tmp_path), []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if sum(waited) >= lock.STALE_S:
            os.utime(path, (1000.0, 1000.0))

    with pytest.raises(Occupied):
        lock.take(path, pause)


def test_a_holder_that_was_silent_for_the_stated_time_has_lost_the_directory(tmp_path):
    path, waited = left_behind(tmp_path), []
    with lock.take(path, waited.append):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert lock.STALE_S <= sum(waited) <= lock.STALE_S + 2 * lock.BEAT_S


def test_on_one_machine_nobody_is_waited_for(tmp_path):
    (tmp_path / "lock").write_text(json.dumps(FAR | {"machine": lock.machine()}))
    lock.take(tmp_path / "lock", lambda seconds: pytest.fail("waited")).close()


def test_a_lease_that_was_given_back_is_free_at_once(tmp_path):
    lock.take(tmp_path / "lock").close()
    assert (tmp_path / "lock").read_text() == "" and lock.owner(tmp_path / "lock") is None


def test_without_locks_of_the_file_system_the_lease_decides(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    path = left_behind(tmp_path)
    with pytest.raises(Occupied):
        lock.take(path, beats(path, [1000.0]))
    lock.take(path, lambda seconds: None).close()


def test_a_holder_that_lives_sets_the_time_of_the_file(tmp_path):
    with lock.take(tmp_path / "lock") as lease:
        os.utime(tmp_path / "lock", (1000.0, 1000.0))
        assert not lock.owner(tmp_path / "lock").alive
        lease.beat()
        assert lock.owner(tmp_path / "lock").alive


def test_a_holder_that_was_replaced_is_told_by_whom_and_beats_no_more(tmp_path):
    told: list[Holder] = []
    with lock.take(tmp_path / "lock") as lease:
        lease.lost = told.append
        left_behind(tmp_path)
        os.utime(tmp_path / "lock", (1000.0, 1000.0))
        lease.beat()
        assert [str(each) for each in told] == ["process 7 on far"]
        assert os.stat(tmp_path / "lock").st_mtime == 1000.0
    assert json.loads((tmp_path / "lock").read_text()) == FAR


def test_a_lease_beats_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    beaten = threading.Event()
    monkeypatch.setattr(Lease, "beat", lambda lease: beaten.set())
    with lock.take(tmp_path / "lock"):
        assert beaten.wait(60)


def test_a_lease_that_nobody_keeps_is_given_back(tmp_path):
    lock.take(tmp_path / "lock")
    lock.take(tmp_path / "lock").close()


def test_who_was_refused_is_told_alike_on_all_ranks(tmp_path):
    with lock.take(tmp_path / "lock"), pytest.raises(Occupied) as caught:
        lock.take(tmp_path / "lock")
    there = pickle.loads(pickle.dumps(caught.value))
    assert (str(there), there.owner) == (str(caught.value), caught.value.owner)


def test_the_owner_is_told_without_torch():
    names = "import sys; from shardforge.train import lock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", names]).returncode == 0


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
