from __future__ import annotations

import pytest

from shardforge.cli import main as cli
from shardforge.cli import zoo
from shardforge.core import slots

HEADER = """An idea in one line.

Paper: Someone 2024, "A title: with a colon",
    arXiv:0000.00000.
Changes: y = x.

Cost: nothing.
Note: not a field.
"""


def test_the_first_line_of_a_header_is_its_summary():
    assert zoo.read_header(HEADER)[0] == "An idea in one line."


def test_a_field_of_a_header_may_go_on_in_the_next_line():
    assert zoo.read_header(HEADER)[1]["Paper"] == 'Someone 2024, "A title: with a colon", arXiv:0000.00000.'


def test_a_blank_line_ends_a_field_and_other_words_are_none():
    fields = zoo.read_header(HEADER)[1]
    assert fields["Changes"] == "y = x." and fields["Cost"].startswith("nothing.")
    assert set(fields) == {"Paper", "Changes", "Cost"}


def test_a_file_without_a_docstring_has_an_empty_header():
    assert zoo.read_header("") == ("", {})


@pytest.mark.parametrize("slot", zoo.every_slot(), ids=lambda slot: slot.name)
def test_every_kind_says_what_it_is(slot: slots.Slot):
    assert [entry.kind for entry in zoo.entries(slot) if not entry.summary] == []


def test_every_slot_has_a_kind():
    assert [slot.name for slot in zoo.every_slot() if not slot.kinds()] == []


def test_one_slot_is_printed_alone(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["zoo", "norm"]) == 0
    printed = capsys.readouterr().out
    assert "norm: rmsnorm" in printed and "mixer:" not in printed


def test_a_mistyped_slot_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["zoo", "mixr"]) == 2
    assert "did you mean 'mixer'?" in capsys.readouterr().err
