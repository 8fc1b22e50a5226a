from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist

from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.observe.base import Slow
from shardforge.train import guard, pulse
from shardforge.train.board import Board, Unreachable
from shardforge.train.failure import Failure
from shardforge.train.place import Place, ranges
from shardforge.train.pulse import Heart
from shardforge.train.verdict import Paced, Scene, Standing

DP2 = Layout(dp_shard=2)
WAITING = Place("all_reduce", "mesh_dp_shard", ranges((0, 1)), line="optim/clip.py:44 in global_norm")
LATE_S = 60.0


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture
def hearts(tmp_path, monkeypatch, store) -> Iterator[Callable[..., Heart]]:
    """hearts(1): the heart of rank 1 of two, joined to a store in memory, not beating by itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SHARDFORGE_START", "a")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(pulse, "SETTLED", 0)
    made: list[Heart] = []
    monkeypatch.setattr(Heart, "_pause", lambda heart, seconds: [each._publish() for each in made])

    def make(rank: int, timeout_s: float = 600.0) -> Heart:
        monkeypatch.setenv("RANK", str(rank))
        heart = Heart(RunDir(tmp_path / "run"), DP2, timeout_s)
        heart.board = Board(store, "a")
        heart._thread = threading.current_thread()
        made.append(heart)
        return heart

    yield make
    for heart in made:
        heart.board.close()


class Left(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def leaving(monkeypatch) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(pulse, "leave", leave)


def stands(heart: Heart, seconds: float, place: Place = WAITING) -> None:
    """The main thread of a rank has been there for so long, and its pulse says so."""
    heart.pulse = replace(heart.pulse, idle=seconds, place=place)
    heart._publish()


def gone(store: dist.Store) -> None:
    raise RuntimeError("Connection reset by peer")


def test_what_a_rank_publishes_is_what_the_others_read(hearts):
    mine, other = hearts(0), hearts(1)
    stands(other, 17.0)
    assert mine._read()[1] == other.pulse


def test_a_thread_that_stands_still_grows_idle_and_one_that_moves_does_not(hearts, monkeypatch):
    heart, clock, seen = hearts(0), [0.0], [1]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pulse, "signature", lambda stack: seen[0])
    monkeypatch.setattr(pulse.time, "clock_gettime", lambda clock: 0.0)
    idle = []
    for moved in (True, False, False, False, True, False):
        clock[0], seen[0] = clock[0] + 1.0, seen[0] + moved
        heart._feel()
        idle.append(heart.pulse.idle)
    assert idle == [0.0, 1.0, 2.0, 3.0, 0.0, 1.0]


def test_time_in_which_the_process_itself_was_stopped_is_not_idle(hearts, monkeypatch):
    heart, clock = hearts(0), [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pulse, "signature", lambda stack: 1)
    for now in (1.0, 2.0, 5000.0):
        clock[0] = now
        heart._feel()
    assert heart.pulse.idle <= 4 * heart.interval


def test_a_thread_that_computes_outside_of_collectives_is_not_idle(hearts, monkeypatch):
    heart, clock = hearts(0), [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pulse, "signature", lambda stack: 1)
    monkeypatch.setattr(pulse.time, "clock_gettime", lambda _: clock[0])
    for now in range(1, 20):
        clock[0] = float(now)
        heart._feel()
    assert heart.pulse.idle <= 3.0


def test_the_whole_place_is_looked_up_only_when_a_thread_stands_still(hearts, monkeypatch):
    heart, clock, looked = hearts(0), [0.0], []
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pulse, "signature", lambda stack: 1)
    monkeypatch.setattr(pulse, "place", lambda stack: looked.append(clock[0]) or WAITING)
    for now in range(1, 8):
        clock[0] = float(now)
        heart._feel()
    assert looked == [3.0] and heart.pulse.place == WAITING


def test_one_rank_speaks_and_tells_the_others(hearts, leaving, capsys):
    first, second = hearts(0), hearts(1)
    stands(first, 601.0)
    stands(second, 601.0, Place(line="data/loader.py:131 in batch"))
    with pytest.raises(Left, match="1"):
        first._conclude()
    with pytest.raises(Left, match="1"):
        second._listen()
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert (
        "rank 0 (dp0) waited 601 s in all_reduce over dp at optim/clip.py:44 in global_norm, for rank 1 (dp1)" in told
    )


def test_a_rank_whose_turn_it_is_not_waits_for_the_one_whose_turn_it_is(hearts, leaving):
    first, second = hearts(0), hearts(1)
    stands(first, 601.0)
    stands(second, 601.0)
    assert first._takes_turn()
    second._conclude()  # returns
    stands(second, 601.0 + pulse.GRACE_S)
    with pytest.raises(Left):
        second._conclude()


def test_while_a_checkpoint_is_read_a_working_rank_is_waited_for(hearts, leaving):
    first, second = hearts(0), hearts(1)
    stands(first, 601.0, replace(WAITING, line="checkpoint/crew.py:68 in _exchange"))
    stands(second, 0.0)
    first._conclude()
    assert first._not_before > 601.0 and second._takes_turn()


SAVING = Place(line="checkpoint/store.py:144 in _settle", leaf="python3.11/threading.py:1119 in join")


@pytest.mark.parametrize(
    ("mine", "other", "patient"),
    [
        (SAVING, SAVING, True),
        (replace(WAITING, line="checkpoint/crew.py:68 in _exchange"), SAVING, True),
        (replace(WAITING, line="checkpoint/crew.py:68 in _exchange"), WAITING, False),
        (WAITING, SAVING, False),
    ],
    ids=["both write", "the other writes", "the other waits elsewhere", "a wait in the step"],
)
def test_slow_disks_are_waited_for_and_nothing_else_is(hearts, mine, other, patient):
    first, second = hearts(0), hearts(1)
    stands(first, 601.0, mine)
    stands(second, 601.0, other)
    assert first._is_patient(first._scene("")) is patient


def test_with_a_rank_gone_nobody_waits_for_disks(hearts):
    heart = hearts(0)
    stands(heart, 601.0, SAVING)
    assert not heart._is_patient(heart._scene(""))


def test_a_thread_that_moved_after_all_is_left_alone(hearts, leaving, monkeypatch):
    heart = hearts(0)
    stands(heart, 601.0)
    monkeypatch.setattr(Heart, "_scene", lambda heart, begun: setattr(heart, "_seen", 99))
    heart._conclude()
    assert heart._not_before == heart.timeout


def test_a_rank_that_failed_tells_the_others_its_code(hearts, leaving):
    failed, other = hearts(1), hearts(0)
    failed.tell(Failure(text="error: it is wrong", code=2))
    with pytest.raises(Left, match="2"):
        other._listen()


def test_what_a_rank_could_not_write_down_the_first_one_says(hearts, leaving, capsys):
    failed, first = hearts(1), hearts(0)
    failed.tell(Failure(text="error: it is wrong", code=2))
    with pytest.raises(Left):
        first._listen()
    assert capsys.readouterr().err == "error: it is wrong\n"


def test_a_collective_that_failed_is_told_as_it_was(hearts, monkeypatch):
    first, second = hearts(0), hearts(1)
    stands(second, 3.0, Place(line="data/loader.py:131 in batch"))
    monkeypatch.setattr(pulse, "place", lambda stack: WAITING)
    told = first.lost(RuntimeError("Connection closed by peer"))
    assert "rank 0 (dp0) lost contact in all_reduce over dp at optim/clip.py:44" in told.text


def test_nothing_is_told_of_a_collective_when_another_rank_has_spoken(hearts):
    first, second = hearts(0), hearts(1)
    assert second._takes_turn()
    second.tell(Failure(text="error: ..."))
    assert first.lost(RuntimeError("Connection closed by peer")).text == ""


def asks(heart: Heart) -> None:
    heart._ask(lambda store: store.set("look", "0.1"))


def test_a_rank_that_is_asked_for_its_stacks_shows_them_once(hearts, monkeypatch):
    first, second = hearts(0), hearts(1)
    told = iter(["in a", "never"])
    monkeypatch.setattr(second, "_stacks", lambda: next(told))
    monkeypatch.setattr(first, "_stacks", lambda: "in b")
    second._show()
    assert first._all_stacks() == {0: "in b"}
    asks(first)
    second._show()
    second._show()
    assert first._all_stacks() == {0: "in b", 1: "in a"}


def test_equal_stacks_are_kept_once(hearts, monkeypatch, store):
    first, second = hearts(0), hearts(1)
    monkeypatch.setattr(Heart, "_stacks", lambda heart: "in a")
    asks(first)
    before = store.num_keys()
    second._show()
    after_one = store.num_keys()
    first._show()
    assert (after_one - before, store.num_keys() - after_one) == (2, 1)


def test_the_page_of_a_verdict_has_the_stacks_of_all_ranks(hearts, leaving, monkeypatch):
    first, second = hearts(0), hearts(1)
    stands(first, 601.0)
    stands(second, 601.0, Place(line="data/loader.py:131 in batch"))
    for heart, text in ((first, "in all_reduce"), (second, "in batch")):
        monkeypatch.setattr(heart, "_stacks", lambda text=text: text)
    monkeypatch.setattr(Heart, "_pause", lambda heart, seconds: (second._publish(), second._show()))
    with pytest.raises(Left):
        first._conclude()
    page = first.run_dir.verdict.read_text()
    assert "stack of rank 1 (dp1)\nin batch\n" in page and "stack of rank 0 (dp0)\nin all_reduce\n" in page


def test_without_the_store_only_the_own_stacks_are_known(hearts, monkeypatch):
    heart = hearts(0)
    monkeypatch.setattr(heart, "_stacks", lambda: "in a")
    with pytest.raises(Unreachable):
        heart.board.ask(gone, LATE_S)
    assert heart._all_stacks() == {0: "in a"}


def steps(heart: Heart, count: int, worked: float) -> None:
    heart.pace.sums = Paced(count, 2.0 * count, worked * count)
    heart._publish()


def test_the_first_rank_compares_all_when_it_is_time(hearts, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    first, second = hearts(0), hearts(1)
    monkeypatch.setattr(first.review, "due", lambda: True)
    for count in (10, 20):
        steps(first, count, 0.5)
        steps(second, count, 1.5)
        first._review()
    assert first.pace.take() == (Slow(1, "dp1", "node7", "work", 1.5, 0.5),)


@pytest.mark.parametrize(("rank", "due"), [(0, False), (1, True)])
def test_nobody_else_does_and_not_before(hearts, monkeypatch, rank, due):
    heart = hearts(rank)
    monkeypatch.setattr(heart.review, "due", lambda: due)
    monkeypatch.setattr(heart, "_read", lambda: pytest.fail("read the pulses of all ranks"))
    heart._review()


def test_a_heart_that_never_began_to_beat_knows_nothing(tmp_path):
    heart = Heart(RunDir(tmp_path), Layout(), 600)
    heart.tell(Failure(text="error: ..."))
    heart.stop()
    assert heart.lost(RuntimeError()) is None


@pytest.mark.parametrize(("hosted", "owner"), [("True", "the launcher"), ("False", "rank 0 (dp0)")])
def test_without_the_store_its_host_is_named(hearts, monkeypatch, hosted, owner):
    heart = hearts(1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", hosted)
    with pytest.raises(Unreachable):
        heart.board.ask(gone, LATE_S)
    scene = heart._scene("waited 600 s in")
    assert f"{owner}, which hosts the store at" in scene.lost_store and scene.lost_store.endswith("is gone")


def test_a_rank_whose_launcher_is_gone_asks_itself_to_stop_once(hearts, monkeypatch, caplog):
    heart, asked = hearts(0), []
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append((pid, number)))
    heart._launcher = -1
    with caplog.at_level(logging.WARNING, "shardforge.train"):
        heart._follow_launcher()
        heart._follow_launcher()
    assert asked == [(os.getpid(), signal.SIGTERM)] and "the launcher (process -1) is gone" in caplog.text


def test_a_rank_with_its_launcher_goes_on(hearts, monkeypatch):
    heart = hearts(0)
    monkeypatch.setattr(os, "kill", lambda pid, number: pytest.fail("asked to stop"))
    heart._launcher = os.getppid()
    heart._follow_launcher()


def test_a_heart_beats_until_it_is_stopped_and_says_goodbye(tmp_path, monkeypatch, store):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    heart, others = Heart(RunDir(tmp_path), DP2, 1.0), Board(store, guard.start_id())
    heart.start(store)
    deadline = time.monotonic() + LATE_S
    while heart.pulse.count < 3 and time.monotonic() < deadline:
        pass
    heart.stop()
    last = pulse._pulse(others.ask(lambda store: store.get("pulse/0"), LATE_S))
    others.close()
    assert last.count >= 3 and last.left and not heart._thread.is_alive()


def test_a_scene_has_all_ranks_also_those_that_never_came(hearts):
    found = hearts(0)._scene("waited 1 s in")
    assert isinstance(found, Scene) and found.ranks[1] == Standing(1, None, "frozen", found.ranks[1].words)
