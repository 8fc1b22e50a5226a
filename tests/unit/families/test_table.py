from __future__ import annotations

import pytest

from shardforge.families.family import families
from shardforge.families.forms import SAME
from shardforge.families.table import Place, Row, layers, places, rows

TABLE = (
    *rows({"embed": "wte"} | layers("blocks.{layer}", "h.{layer}", {"mixer.out": "proj"})),
    Row(("blocks.{layer}.mixer.q.{leaf}", "blocks.{layer}.mixer.k.{leaf}"), ("h.{layer}.qk_{leaf}",)),
)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("embed.weight", Place(("wte.weight",), SAME, 0)),
        ("blocks.12.mixer.out.bias", Place(("h.12.proj.bias",), SAME, 0)),
        ("blocks.3.mixer.k.weight", Place(("h.3.qk_weight",), SAME, 1)),
        ("blocks.x.mixer.k.weight", None),
        ("blocks.3.mixer.k.weight.more", None),
        ("embedXweight", None),
    ],
)
def test_a_name_leads_to_the_place_of_its_role(name, place):
    assert list(places(TABLE, [name])) == [(name, place)]


@pytest.mark.parametrize("architecture", families())
def test_no_two_rows_of_a_family_mean_the_same_weight(architecture):
    table = families()[architecture].table
    ours = [name for row in table for name in row.ours]
    theirs = [name for row in table for name in row.theirs]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
