from __future__ import annotations

import json
import math

import pytest

from shardforge.core.layout import Layout
from shardforge.verify.cases import Case
from shardforge.verify.verdict import (
    Report,
    Verdict,
    as_json,
    conclusion,
    explanation,
    header,
    introduction,
    pattern,
    row,
    sentence,
    stacked,
)

MODEL = {"layers": ["a", "a", "b"], "hidden": 32, "vocab": 48, "seq_len": 32, "sequences": 8, "weights": 1234567}


def judged(layout: str, status: str = "equal", **more) -> Verdict:
    return Verdict(Case(Layout.parse(layout)), status, {"loss": 1e-16, "gradient": 2e-15}, **more)


def report(*verdicts: Verdict, unproved: list[str] | None = None) -> Report:
    return Report("mine", MODEL, list(verdicts), unproved or [])


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["equal", "equal"], 0),
        (["equal", "different"], 1),
        (["failed"], 1),
        (["equal", "refused"], 2),
        (["refused", "different"], 1),
    ],
)
def test_the_exit_code_follows_from_the_worst_verdict(states: list[str], code: int):
    assert report(*(judged("dp2", state) for state in states)).exit_code == code


def test_the_first_line_says_what_is_held_against_what_and_how_small_it_is():
    told = introduction(report(), [Case(Layout(tp=2)), Case(Layout(dp_shard=2))])
    assert told.startswith("mine: 2 layouts against one process, in float64 to 1e-10")
    assert "1.23M weights, hidden 32, layers a x 2, b" in told


def test_a_row_stands_under_the_header():
    listed = [Case(Layout.parse("dp2-tp2"))]
    line = row(judged("dp2-tp2", resumed=("dp4", 3e-16)), listed)
    assert line.split() == ["dp2-tp2", "1e-16", "-", "2e-15", *["-"] * 6, "3e-16", "equal"]
    assert header(listed).index("verdict") == line.index("equal")


def test_a_difference_names_the_first_weight_and_the_cause():
    told = explanation(judged("tp2", "different", worst="step 1: x", first="a", last="b", cause="because"))
    assert told.splitlines() == [
        "tp2 differs: step 1: x",
        "  first weight that differs, as the forward pass meets them: a",
        "  last one, which the backward pass meets first: b",
        "  likely cause: because",
    ]


def test_what_the_failing_layouts_share_is_said():
    verdicts = [judged("tp2", "different"), judged("dp2-tp2", "failed"), judged("dp2")]
    assert pattern(verdicts) == "every case with tp > 1 differs, and no other"


def test_nothing_is_said_where_they_share_nothing():
    assert pattern([judged("tp2", "different"), judged("dp2", "different"), judged("cp2")]) == ""


def test_an_option_can_be_what_they_share():
    cases = [Case(Layout(pp=2), (("schedule", name),)) for name in ("zbv", "1f1b")]
    verdicts = [Verdict(cases[0], "different"), Verdict(cases[1])]
    assert pattern(verdicts) == "every case with schedule=zbv differs, and no other"


def test_the_end_says_what_stays_unproved_and_the_verdict():
    told = conclusion(report(judged("dp2"), unproved=["tp 8 is verified at 2"]))
    assert told.splitlines()[-3:] == [
        "not proved here:",
        "  tp 8 is verified at 2",
        "verified: the case equals one process",
    ]


def test_a_mixed_end_counts():
    assert sentence(report(judged("dp2"), judged("tp2", "failed"))) == "not verified: 1 equal, 1 failed of 2 cases"


def test_json_has_every_verdict_and_no_number_that_json_lacks():
    verdict = judged("tp2", "different", rule="lost")
    verdict.errors["gradient"] = math.inf
    found = json.loads(json.dumps(as_json(report(verdict)), allow_nan=False))
    assert found["exit_code"] == 1 and found["cases"][0]["errors"]["gradient"] is None
    assert found["cases"][0]["rule"] == "lost" and found["cases"][0]["layout"] == "tp2"


def test_runs_of_blocks_print_short():
    assert stacked(["a", "a", "b", "a"]) == "a x 2, b, a"
