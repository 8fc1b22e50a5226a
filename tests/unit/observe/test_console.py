from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        ({"job": "123", "restart": 2, "reason": "walltime"}, "job 123, restart 2, because: walltime"),
        ({"job": "123", "restart": 0, "reason": "first"}, "job 123"),
        ({"reason": "SIGTERM"}, "because: SIGTERM"),
    ],
)
def test_a_restart_says_of_which_job_and_why(make_info, attempt, told):
    assert printed([], make_info(attempt=attempt))[1:] == [told]


def test_a_first_start_at_home_has_one_line(make_info):
    assert len(printed([], make_info())) == 1


def slow_lines(reports, info) -> list[str]:
    return [line for line in printed(reports, info) if line.startswith("slow: ")]


@pytest.mark.parametrize(
    ("measure", "value", "usual", "told"),
    [
        ("work", 1.5, 0.75, "1.5 s of own work a step, others 750 ms"),
        ("data", 1.5, 0.75, "1.5 s of waiting for data a step, others 750 ms"),
        ("device", 3.1e14, 6.4e14, "its device reaches 310T FLOP/s, others 640T"),
    ],
)
def test_a_slow_rank_is_told_with_its_node_and_what_it_lacks(make_info, make_report, late, measure, value, usual, told):
    slow = replace(late, measure=measure, value=value, usual=usual)
    (line,) = slow_lines([make_report(1, slow=(slow,))], make_info())
    assert line.startswith("slow: rank 5 (dp1) on node3: ") and line.endswith(told), line


def test_a_rank_that_stays_slow_is_told_once(make_info, make_report, late):
    other = replace(late, rank=6)
    reports = [make_report(1, slow=(late,)), make_report(2, slow=(late,)), make_report(3, slow=(late, other))]
    assert [line.split()[2] for line in slow_lines(reports, make_info())] == ["5", "5", "6"]


def test_of_many_slow_ranks_a_few_are_named(make_info, make_report, late):
    many = tuple(replace(late, rank=rank) for rank in range(100))
    lines = slow_lines([make_report(1, slow=many)], make_info())
    assert len(lines) < 12 and lines[-1] == "slow: and 92 more ranks"


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
