from __future__ import annotations

import os

import pytest

from shardforge.core.errors import LaunchError
from shardforge.launch import history
from shardforge.launch.history import Attempt, End

BEGUN = Attempt(start="7.0.0", job="7", nodes=("n1", "n2"), step=5, reason="first", time=1.0)
ENDED = End(
    outcome="failed", step=9, reason="crash in step 10: x", decision="again x", failed_step=10, blamed=("n1",), time=2.0
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "launch" / "attempts.jsonl"


def test_what_is_written_is_read(path):
    history.begun(path, BEGUN)
    assert history.read(path) == [BEGUN]
    history.ended(path, "7.0.0", ENDED)
    [found] = history.read(path)
    assert (found.end, found.advanced, found.end.kind) == (ENDED, True, "crash")


def test_a_run_without_the_file_has_no_attempts(path):
    assert history.read(path) == []


@pytest.mark.parametrize(
    "rest", ['{"event": "end", "start": "7.0.0", "outco', '{"event": "end"}', "x", "[1]", "\udcff"]
)
def test_a_line_that_a_kill_tore_was_never_said(path, rest):
    history.begun(path, BEGUN)
    with path.open("ab") as file:
        file.write(rest.encode(errors="surrogateescape"))
    assert history.read(path) == [BEGUN]


def test_what_follows_a_torn_line_is_read(path):
    history.begun(path, BEGUN)
    with path.open("a") as file:
        file.write('{"event": "end", "sta')
    history.ended(path, "7.0.0", ENDED)
    assert history.read(path)[0].end == ENDED


def test_an_attempt_begins_once(path):
    history.begun(path, BEGUN)
    history.begun(path, Attempt(start="7.0.0", job="8", time=3.0))
    assert history.read(path) == [BEGUN]


def test_a_presumed_end_is_corrected_by_a_seen_one_and_not_the_other_way_round(path):
    presumed = End(outcome="lost", step=5, reason="lost with its node or its job", time=1.5)
    history.begun(path, BEGUN)
    for end in (presumed, ENDED, presumed):
        history.ended(path, "7.0.0", end)
    assert history.read(path)[0].end == ENDED


def test_an_end_of_an_attempt_that_never_began_is_nobodys(path):
    history.ended(path, "7.0.0", ENDED)
    assert history.read(path) == []


def test_a_full_disk_is_said(path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, text: 3)
    with pytest.raises(LaunchError, match="the disk took only part of a line"):
        history.begun(path, BEGUN)


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "launch").write_text("a file")
    with pytest.raises(LaunchError, match="cannot be noted"):
        history.begun(tmp_path / "launch" / "attempts.jsonl", BEGUN)


def test_an_attempt_knows_its_numbers_from_its_name():
    found = history.named("4711.2.1", ["n1"], 5, "why")
    assert (found.job, found.restart, found.tried, found.step) == ("4711", 2, 1, 5)


@pytest.mark.parametrize("name", ["", "4711", "4711.a.0", "4711.0", ".0.0"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(LaunchError, match="is no name of an attempt"):
        history.named(name, [], 0, "")
