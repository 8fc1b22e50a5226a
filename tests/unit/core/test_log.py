from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from shardforge.core import log


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The shardforge logger before setup, put back as it was afterwards."""
    found = logging.getLogger("shardforge")
    before = found.handlers, found.level, found.propagate
    found.handlers, found.propagate = [], True  # pytest gives handlers to a logger that keeps its records
    yield found
    found.handlers, found.level, found.propagate = before


def test_first_rank_speaks_without_a_prefix(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "0")
    log.setup()
    log.logger("train").info("hello")
    assert capsys.readouterr().err.endswith(" hello\n")


def test_other_ranks_keep_their_news_to_themselves(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "3")
    log.setup()
    log.logger("train").info("hello")
    assert capsys.readouterr().err == ""


def test_warnings_of_other_ranks_name_the_rank(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "3")
    log.setup()
    log.logger("train").warning("slow")
    assert "[rank 3] slow" in capsys.readouterr().err


def test_setting_up_twice_prints_once(root: logging.Logger):
    log.setup()
    log.setup()
    assert len(root.handlers) == 1
