from __future__ import annotations

import dataclasses
import json

import pytest

from shardforge.launch.preflight_checks import ENOUGH, FEW, STOP, Verdict
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_facts import Facts, Gpu
from shardforge.launch.preflight_rates import Rate
from shardforge.launch.preflight_report import SHOWN, Report
from shardforge.launch.preflight_survey import Survey
from shardforge.launch.preflight_wanted import Wanted

GIB = 1 << 30
FACTS = Facts(
    host="h",
    gpus=tuple(Gpu(index=index, name="NVIDIA H100", used=0, ecc=0) for index in range(8)),
    versions={"driver": "550.54", "NCCL": "2.27.3"},
    free_memory=900 * GIB,
    free_disk=70 * GIB,
    write_bytes_s=2.0 * GIB,
)
SURVEY = Survey(
    facts={
        "a": FACTS,
        "b": dataclasses.replace(FACTS, free_memory=800 * GIB, write_bytes_s=1.0 * GIB, clock_s=0.02),
    },
    pairs=[Rate(("a", "b"), 46.0), Rate(("a", "c"), 4.0)],
    together=Rate(("a", "b"), 300.0),
)
WANTED = Wanted(nodes=2, gpus=8, config=PreflightConfig(pair_gb_s=40.0, all_reduce_gb_s=250.0))
GOOD = Verdict(ENOUGH, ("a", "b"), {"c": ("slow", "old driver")}, warnings=("little time",))


def report(verdict: Verdict = GOOD) -> Report:
    return Report("12.0.1", ["a", "b", "c"], WANTED, SURVEY, verdict, 21.0)


def test_the_console_tells_verdict_bad_nodes_and_the_weakest_of_everything():
    assert list(report().lines()) == [
        "preflight 12.0.1: 2 of 3 nodes are good, 2 needed (21 s)",
        "  c is bad: slow; old driver",
        "  warning: little time",
        "  8 x NVIDIA H100 · NCCL 2.27.3 · driver 550.54",
        "  memory 800 GiB free at the least (b) · run directory 70.0 GiB free, 1.00 GiB/s written (b) "
        "· clocks within 20 ms",
        "  pairs 4 GB/s at the least (a-c), 25 at the median, floor 40",
        "  all-reduce over 2 nodes 300 GB/s, floor 250",
    ]


@pytest.mark.parametrize(
    ("verdict", "lines"),
    [
        (
            Verdict(STOP, (), {}, ("no corpus",)),
            ["preflight 12.0.1: stop: 0 of 3 nodes are good, 2 needed (21 s)", "  stop: no corpus"],
        ),
        (
            Verdict(FEW, ("a", "b"), {}, short="5 s are left"),
            [
                "preflight 12.0.1: not on these nodes, or not now: 2 of 3 nodes are good, 2 needed (21 s)",
                "  not started: 5 s are left",
            ],
        ),
    ],
)
def test_why_nothing_starts_stands_at_the_top(verdict, lines):
    assert list(report(verdict).lines())[:2] == lines


def test_a_thousand_bad_nodes_are_not_a_thousand_lines():
    verdict = Verdict(FEW, (), {f"n{number}": ("cold",) for number in range(1000)})
    lines = list(report(verdict).lines())
    assert sum("is bad" in line for line in lines) == SHOWN and f"  and {1000 - SHOWN} bad nodes more" in lines


def test_the_files_are_what_the_batch_script_reads(tmp_path):
    report().write(tmp_path / "preflight")
    read = {path.name: path.read_text() for path in (tmp_path / "preflight").iterdir()}
    assert {name: text for name, text in read.items() if not name.endswith("json")} == {
        "12.0.1.nodes": "a\nb\n",
        "12.0.1.bad": "c\tslow; old driver\n",
        "12.0.1.stop": "",
        "12.0.1.code": "0\n",
    }
    told = json.loads(read["12.0.1.json"])
    assert (told["code"], told["good"], told["fatal"]) == (0, ["a", "b"], [])
    assert told["facts"]["b"]["clock_s"] == 0.02 and told["pairs"][1]["gb_s"] == 4.0


def test_reasons_to_stop_are_lines_of_their_own(tmp_path):
    report(Verdict(STOP, (), {}, ("no corpus", "disk full"))).write(tmp_path)
    assert (tmp_path / "12.0.1.stop").read_text() == "no corpus\ndisk full\n"
    assert (tmp_path / "12.0.1.code").read_text() == "4\n"
