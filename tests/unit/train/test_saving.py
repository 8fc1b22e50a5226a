from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from shardforge.checkpoint.store import WRITER
from shardforge.train import saving
from shardforge.train.failure import Failure


@pytest.fixture
def writer() -> Iterator[Callable[..., threading.Thread]]:
    """writer(work): a background save that works like that, until it is told to end."""
    ended, made = threading.Event(), []

    def begin(work: Callable[[], object] = ended.wait) -> threading.Thread:
        made.append(threading.Thread(target=work, name=f"{WRITER}7"))
        made[-1].start()
        return made[-1]

    yield begin
    ended.set()
    for each in made:
        each.join()


@pytest.mark.parametrize("cause", ["error", "hang", "mistake", "order"])
def test_while_all_ranks_live_a_save_is_waited_for(writer, cause):
    begun = threading.Event()
    working = writer(begun.wait)
    threading.Timer(0.05, begun.set).start()
    saving.finish(Failure(text="error: ...", cause=cause))
    assert not working.is_alive()


@pytest.mark.parametrize("cause", ["dead", "frozen", "lost"])
def test_a_save_that_a_lost_rank_holds_up_is_waited_for_only_shortly(writer, monkeypatch, cause):
    monkeypatch.setattr(saving, "SHORT_S", 0.01)
    working = writer()
    saving.finish(Failure(text="error: ...", cause=cause))
    assert working.is_alive()


def test_an_interrupt_waits_for_nothing(writer, monkeypatch):
    working = writer()
    monkeypatch.setattr(threading.Thread, "join", lambda thread, timeout=None: pytest.fail("waited"))
    saving.finish(Failure(text="interrupted", cause="interrupted"))
    monkeypatch.undo()
    assert working.is_alive()


def test_other_threads_are_not_waited_for(monkeypatch):
    ended = threading.Event()
    other = threading.Thread(target=ended.wait, name="loader")
    other.start()
    saving.finish(Failure(text="error: ...", cause="error"))
    ended.set()
    other.join()
