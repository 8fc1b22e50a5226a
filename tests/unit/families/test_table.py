from __future__ import annotations

import pytest

from shardforge.families.table import layers, pattern, rows

NAME = pattern("blocks.{layer}.mixer.q.{leaf}")


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("blocks.12.mixer.q.bias", {"layer": "12", "leaf": "bias"}),
        ("blocks.x.mixer.q.weight", None),
        ("blocks.3.mixer.q.weight.more", None),
        ("blocks.3.mixerXq.weight", None),
        ("blocks.3.mixer.q.", None),
    ],
)
def test_a_name_is_known_by_its_pattern_alone(name, marks):
    hit = NAME.fullmatch(name)
    assert (hit and hit.groupdict()) == marks


def test_rows_of_modules_have_a_leaf_each():
    (row,) = rows(layers("blocks.{layer}", "h.{layer}", {"mixer.out": "proj"}))
    assert (row.ours, row.theirs) == (("blocks.{layer}.mixer.out.{leaf}",), ("h.{layer}.proj.{leaf}",))
