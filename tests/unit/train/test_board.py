from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from shardforge.train.board import Board, Unreachable

LATE_S = 60.0


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def gone(store: dist.Store) -> None:
    raise RuntimeError("Connection reset by peer")


def test_a_store_that_fails_is_gone_for_good(store):
    board = Board(store, "a")
    for work in (gone, lambda store: 1):
        with pytest.raises(Unreachable, match="is gone"):
            board.ask(work, LATE_S)
    board.close()


def test_a_store_that_hangs_does_not_hold_its_caller_and_may_come_back(store):
    board, answer = Board(store, "a"), threading.Event()
    for _ in range(2):
        with pytest.raises(Unreachable, match="does not answer"):
            board.ask(lambda store: answer.wait(LATE_S), 0.01)
    answer.set()
    assert board.ask(lambda store: 5, LATE_S) == 5
    board.close()


def test_two_starts_on_one_store_do_not_meet(store):
    boards = [Board(store, start) for start in ("a", "b")]
    boards[0].ask(lambda store: store.set("said", "x"), LATE_S)
    assert not boards[1].ask(lambda store: store.check(["said"]), LATE_S)
    for board in boards:
        board.close()
