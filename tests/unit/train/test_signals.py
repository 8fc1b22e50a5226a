from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from shardforge.train.signals import ASKING, StopRequests


def agreed_when_one_is_asked(folder: Path, asked: int, how: str) -> tuple[bool, str]:
    with StopRequests(folder / "STOP", dist.group.WORLD) as stop:
        if dist.get_rank() == asked:
            signal.raise_signal(signal.SIGUSR1) if how == "signal" else (folder / "STOP").touch()
        return stop.agreed(), stop.reason


def interrupted_late(folder: Path) -> str:
    with StopRequests(folder / "STOP", dist.group.WORLD) as stop:
        if dist.get_rank() == 0:
            signal.raise_signal(signal.SIGINT)
        stop.agreed()
        if dist.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)
        return stop.reason


def alone(folder: Path) -> StopRequests:
    return StopRequests(folder / "STOP", None)


@pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)
def test_a_signal_asks_for_a_stop_and_is_the_reason(tmp_path, number):
    with alone(tmp_path) as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed() and stop.reason == number.name


def test_the_asking_signals_are_those_of_users_and_of_slurm():
    assert set(ASKING) == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


def test_the_stop_file_asks_for_a_stop(tmp_path):
    with alone(tmp_path) as stop:
        (tmp_path / "STOP").touch()
        assert stop.agreed() and stop.reason == "STOP file"


@pytest.mark.parametrize("written", ["walltime", "asked by me\nand more", "  walltime \n"])
def test_the_first_line_of_a_stop_file_is_the_reason(tmp_path, written):
    with alone(tmp_path) as stop:
        (tmp_path / "STOP").write_text(written)
        assert stop.agreed() and stop.reason == written.strip().splitlines()[0]


def test_a_text_that_comes_after_the_file_is_the_reason_in_the_end(tmp_path):
    with alone(tmp_path) as stop:
        (tmp_path / "STOP").touch()
        stop.agreed()
        (tmp_path / "STOP").write_text("walltime\n")
        assert stop.why() == "walltime"


def test_an_interrupt_of_one_rank_after_a_stop_of_another_interrupts_nothing(ranks, tmp_path):
    """^C reaches all ranks, one after the other; those that have agreed already are about to save."""
    assert ranks(2).run(interrupted_late, tmp_path) == ["SIGINT", "SIGINT"]


@pytest.mark.parametrize("first", ASKING, ids=lambda number: number.name)
def test_an_interrupt_after_a_request_interrupts_at_once(tmp_path, first):
    with alone(tmp_path):
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_scheduler_may_ask_twice(tmp_path, number):
    with alone(tmp_path) as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.agreed()


@pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)
def test_handlers_from_before_return(tmp_path, number):
    before = signal.getsignal(number)
    with alone(tmp_path):
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("asked", [0, 1])
def test_all_ranks_stop_when_one_got_the_signal(ranks, tmp_path, asked):
    answers = ranks(2).run(agreed_when_one_is_asked, tmp_path, asked, "signal")
    assert [stopping for stopping, _ in answers] == [True, True]
    assert [reason for _, reason in answers] == ["SIGUSR1"] * 2


def test_all_ranks_stop_when_the_first_sees_the_stop_file(ranks, tmp_path):
    assert [stopping for stopping, _ in ranks(2).run(agreed_when_one_is_asked, tmp_path, 0, "file")] == [True, True]


def test_no_rank_stops_without_a_request(ranks, tmp_path):
    assert ranks(2).run(agreed_when_one_is_asked, tmp_path, None, "signal") == [(False, "")] * 2
