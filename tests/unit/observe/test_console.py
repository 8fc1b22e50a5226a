from __future__ import annotations

import io
from pathlib import Path

from shardforge.observe.base import EvalReport
from shardforge.observe.console import HEADER, Console, introduction
from shardforge.observe.experts import ExpertTally


def printed(reports, info) -> list[str]:
    stream = io.StringIO()
    console = Console(stream)
    console.on_start(info)
    for report in reports:
        console.on_step(report)
    return stream.getvalue().splitlines()


def test_a_line_is_aligned_with_the_header(make_info, make_report):
    lines = printed([make_report(1)], make_info())
    assert lines[1] == HEADER and len(lines[2]) == len(HEADER)


def test_a_line_says_every_number(make_info, make_report):
    line = printed([make_report(4)], make_info())[-1]
    assert line.split() == ["4/10", "6.0000", "500", "50.0%", "1.500", "1.00e-03", "12", "s", "1.00", "GiB", "25%"]


def test_quick_steps_share_a_line(make_info, make_report):
    reports = [make_report(step, seconds=1.0) for step in range(1, 8)]
    assert [line.split("/")[0].strip() for line in printed(reports, make_info())[2:]] == ["1", "6"]


def test_the_last_step_always_has_its_line(make_info, make_report):
    reports = [make_report(step, seconds=0.001) for step in range(1, 11)]
    assert [line.split("/")[0].strip() for line in printed(reports, make_info())[2:]] == ["1", "10"]


def test_a_loss_that_is_not_finite_always_has_its_line(make_info, make_report):
    reports = [make_report(1), make_report(2, seconds=0.001, loss=float("nan"))]
    assert "nan" in printed(reports, make_info())[-1]


def test_without_a_peak_the_line_says_flops(make_info, make_report):
    assert printed([make_report(4, peak_flops=0.0, model_flops=6e9)], make_info())[-1].split()[3] == "3.00G"


def test_the_start_says_what_runs_where(make_info):
    line = printed([], make_info(first_step=4))[0]
    assert line.startswith("first: 8.00M weights, layout dp2 on 2 processes, steps 5 to 10 in ")


def test_events_between_steps_have_their_lines(make_info):
    stream = io.StringIO()
    console = Console(stream)
    console.on_start(make_info())
    console.on_eval(EvalReport(step=3, loss=2.5, tokens=2000))
    console.on_checkpoint(3, Path("checkpoints/step-3"))
    console.on_end("stopped")
    assert stream.getvalue().splitlines()[1:] == [
        "held-out loss 2.5000 after step 3 (2.00K tokens)",
        "checkpoint of step 3 in checkpoints/step-3",
        "run stopped",
    ]


def test_a_reader_that_has_seen_enough_does_not_end_the_run():
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Console(Closed()).on_end("finished")


def test_a_finished_run_that_is_started_again_says_so(make_info):
    assert "all 300 steps done" in introduction(make_info(steps=300, first_step=300))


def test_a_collapsing_layer_has_a_line_below_that_of_its_step(make_info, make_report):
    well, lost = (ExpertTally(load, 4.0, 1.0, 0.0) for load in ((2.0, 2.0), (4.0, 0.0)))
    assert printed([make_report(4, experts={1: well})], make_info())[-1].startswith("          4/10")
    line = printed([make_report(4, experts={1: well, 2: lost})], make_info())[-1]
    assert line == (
        "experts collapsing in 1 of 2 layers: MaxVio 1.00 in layer 2; 1 of 4 without a token, most in layer 2: 1 of 2"
    )
