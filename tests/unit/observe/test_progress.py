from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from shardforge.observe import progress
from shardforge.observe.base import EvalReport
from shardforge.observe.console import Console
from shardforge.observe.experts import ExpertTally
from shardforge.observe.health import recall, record
from shardforge.observe.progress import Progress, Trace, display

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def live(screen):
    observer = Progress(Terminal(file=screen, force_terminal=True, width=100), Clock())
    yield observer
    observer.close()


def shown(observer: Progress) -> str:
    out = io.StringIO()
    Terminal(file=out, width=100).print(observer.render())
    return out.getvalue()


def test_slow_ranks_are_shown_as_long_as_they_are_news(live, make_info, make_report, late):
    live.on_start(make_info())
    live.on_step(make_report(4, slow=(late,)))
    live.on_step(make_report(5))
    assert str(late) in shown(live)
    live._clock.now += progress.SLOW_S
    assert str(late) not in shown(live)


def test_a_restart_shows_of_which_job_and_why(live, make_info):
    live.on_start(make_info(attempt={"job": "123", "restart": 2, "reason": "walltime"}))
    assert "job 123, restart 2, because: walltime" in shown(live)


def test_the_display_says_every_number(live, make_info, make_report):
    live.on_start(make_info())
    live.on_step(make_report(4))
    live.on_eval(EvalReport(step=3, loss=7.125, tokens=10))
    live.on_checkpoint(2, Path("step-2"))
    text = shown(live)
    expected = (
        "first · 8.00M weights · dp2 · 2 ranks", "4/10", "40%", "12 s left", "6.0000", "norm 1.500", "1.00e-03",
        "500 tokens/s", "50.0% of peak", "25.0% waiting for data", "12.5% saving", "1.00 GiB",
        "7.1250 after step 3", "step 2",
    )  # fmt: skip
    assert [part for part in expected if part not in text] == []


def test_a_name_that_looks_like_markup_stays_text(live, make_info):
    live.on_start(make_info(name="[bold]x[/]"))
    assert "[bold]x[/]" in shown(live)


def test_a_resumed_run_shows_its_step_before_the_first_report(live, make_info):
    live.on_start(make_info(first_step=4))
    assert "4/10" in shown(live)


def test_long_silence_is_shown(live, make_info, make_report):
    live.on_start(make_info())
    live.on_step(make_report(1))
    live._clock.now = 130.0
    assert "no news for 2m10s" in shown(live)


def test_the_cursor_is_hidden_while_the_run_goes_on(live, screen, make_info):
    live.on_start(make_info())
    assert HIDE in screen.getvalue() and SHOW not in screen.getvalue()


def test_the_end_gives_the_terminal_back(live, screen, make_info):
    live.on_start(make_info())
    live.on_end("finished")
    assert screen.getvalue().rindex(SHOW) > screen.getvalue().rindex(HIDE)


def test_the_last_picture_stays_with_the_verdict(live, screen, make_info):
    live.on_start(make_info())
    live.on_end("stopped")
    assert "run stopped" in screen.getvalue()


def test_log_lines_go_above_the_display_and_back_to_the_terminal(live, make_info):
    handler = logging.StreamHandler(sys.stderr)
    before = sys.stderr
    logging.getLogger("shardforge").addHandler(handler)
    try:
        live.on_start(make_info())
        during = handler.stream
        live.on_end("finished")
    finally:
        logging.getLogger("shardforge").removeHandler(handler)
    assert during is not before and handler.stream is before


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "RuntimeError"])
def test_an_uncaught_error_gives_the_terminal_back(tmp_path: Path, error: str):
    code = f"""
from pathlib import Path
from shardforge.observe.base import RunInfo
from shardforge.observe.progress import display
display().on_start(RunInfo(name="x", path=Path("."), layout="one", world_size=1, weights=1, steps=1, first_step=0,
                           recipe={{}}))
raise {error}
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment
    ) as child:
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
        child.wait()
    os.close(ours)
    text = seen.decode()
    assert error in text and 0 <= text.rfind(HIDE) < text.rfind(SHOW)


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # the other side of a pseudo terminal is closed
        return b""


def test_without_a_terminal_lines_are_printed():
    assert isinstance(display(), Console)


@pytest.mark.parametrize(("term", "kind"), [("xterm", Progress), ("dumb", Console), ("", Console)])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch, term: str, kind: type):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(progress.sys, "stdout", type("Screen", (io.StringIO,), {"isatty": lambda self: True})())
    assert isinstance(display(), kind)


def test_a_trace_runs_from_its_highest_to_its_lowest_mark():
    trace = Trace(8)
    for value in (4.0, 3.0, 2.0, 1.0):
        trace.add(value)
    drawn = trace.draw()
    assert (drawn[0], drawn[-1], len(drawn)) == ("█", "▁", 4)


@pytest.mark.parametrize("count", [7, 16, 17, 1000])
def test_a_trace_never_outgrows_its_width(count: int):
    trace = Trace(8)
    for value in range(count):
        trace.add(float(value))
    assert 2 <= len(trace.draw()) <= 8


def test_a_trace_passes_over_what_is_not_finite():
    trace = Trace(8)
    for value in (1.0, float("nan"), 2.0):
        trace.add(value)
    assert trace.draw() == "▁█"


def test_a_trace_falls_back_to_plain_characters():
    trace = Trace(8)
    for value in (1.0, 2.0):
        trace.add(value)
    assert trace.draw("latin-1").isascii()


LOST = {2: ExpertTally((6.0, 6.0, 0.0), 8.0, 4.0, 0.0, (-0.25, 0.5))}


def test_a_mixture_shows_its_health(live, make_info, make_report):
    live.on_start(make_info())
    live.on_step(make_report(4, experts=LOST))
    live.on_eval(EvalReport(step=4, loss=7.0, tokens=10, similarity={2: 0.125}))
    text = shown(live)
    expected = (
        "MaxVio 0.50 in layer 2",
        "1 of 3 dead",
        "entropy 46%",
        "selection bias -0.25 to 0.5",
        "alike 0.125",
        "▀▀▀",
    )
    assert [part for part in expected if part not in text] == []


def test_a_model_without_experts_has_no_such_row(live, make_info, make_report):
    live.on_start(make_info())
    live.on_step(make_report(4))
    assert "experts" not in shown(live)


def test_the_last_known_loads_stay_while_a_record_leaves_them_out(live, make_info, make_report):
    live.on_start(make_info())
    live.on_step(make_report(4, experts=LOST))
    live.on_step(make_report(5, experts=recall(record(LOST, loads=False))))
    assert "▀▀▀" in shown(live)


def test_a_terminal_without_colors_has_words_only(make_info, make_report):
    observer = Progress(Terminal(file=io.StringIO(), width=100), Clock())
    observer.on_start(make_info())
    observer.on_step(make_report(4, experts=LOST))
    text = shown(observer)
    observer.close()
    assert "1 of 3 dead" in text and "▀" not in text
