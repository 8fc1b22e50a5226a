from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from torch import Tensor, nn

from shardforge.checkpoint import state
from shardforge.families.family import Family, families
from shardforge.families.forms import EXPERTS, SAME, Rows
from shardforge.families.publish import publish
from shardforge.families.section import config, whole
from shardforge.families.settings import Settings
from shardforge.families.statemap import StateMap
from shardforge.families.table import Row, rows
from shardforge.model.build import build
from tests.unit.families.drawn import settings

ARCHITECTURES = families()
THOROUGH = effort(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def section_of(told: Mapping[str, Any], family: Family) -> dict[str, Any]:
    asked = Settings(told, Path("config.json"))
    section = family.model(asked)
    asked.settle()
    return whole(section, "config.json")


def linked(family: Family, section: dict[str, Any]) -> tuple[StateMap, dict[str, Tensor]]:
    """The map of a model, and weights for it of which no two numbers are alike."""
    table = state.table(build(config(section, "config.json"), nn.Identity()))
    shapes = {name: tuple(each["shape"]) for name, each in table.items()}
    weights, end = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        weights[name] = torch.arange(end, end + count).view(shape)
        end += count
    return StateMap(family.table(section), shapes), weights


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(each, right[name]) for name, each in left.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(data=st.data())
@THOROUGH
def test_to_and_back_is_the_identity(architecture, data):
    family = ARCHITECTURES[architecture]
    map, ours = linked(family, section_of(data.draw(settings(architecture)), family))
    theirs = dict(map.to(ours.__getitem__))
    assert not map.unnamed and same(dict(map.back(theirs.__getitem__)), ours)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(data=st.data())
@THOROUGH
def test_every_tensor_has_one_place_on_either_side(architecture, data):
    family = ARCHITECTURES[architecture]
    map, ours = linked(family, section_of(data.draw(settings(architecture)), family))
    mine = Counter(name for group in map.groups for name in group.ours)
    yours = Counter(name for group in map.groups for name in group.theirs)
    assert mine == dict.fromkeys(ours, 1) and set(yours.values()) == {1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(data=st.data())
@THOROUGH
def test_what_a_family_reads_some_family_can_say(architecture, data):
    family = ARCHITECTURES[architecture]
    section = section_of(data.draw(settings(architecture)), family)
    said = publish(section, "the model")
    assert section_of(said.config, said.family)["vocab"] == section["vocab"] and not said.left


TABLE = (
    *rows({"embed": "wte"}),
    Row(("h.{layer}.q.{leaf}", "h.{layer}.k.{leaf}"), ("h.{layer}.qk_{leaf}",), Rows(2)),
    Row(("h.{layer}.up",), ("h.{layer}.{expert}.up",), EXPERTS, each="expert"),
)
SHAPES = {"embed.weight": (3, 2), "h.7.q.bias": (2,), "h.7.k.bias": (2,), "h.7.up": (2, 3, 5)}


def test_groups_are_in_the_order_of_the_model():
    assert [group.ours for group in StateMap(TABLE, SHAPES).groups] == [
        ("embed.weight",),
        ("h.7.q.bias", "h.7.k.bias"),
        ("h.7.up",),
    ]


def test_a_stack_goes_out_to_a_tensor_for_each_of_its_rows():
    group, part = StateMap(TABLE, SHAPES).place("h.7.up")
    assert (group.theirs, part) == (("h.7.0.up", "h.7.1.up"), 0)


def test_a_weight_is_found_at_its_place_in_a_group():
    group, part = StateMap(TABLE, SHAPES).place("h.7.k.bias")
    assert (group.theirs, part) == (("h.7.qk_bias",), 1)


def test_a_weight_that_no_row_names_is_unnamed():
    assert StateMap(TABLE, SHAPES | {"other": (1,)}).unnamed == ["other"]


def test_a_weight_whose_group_is_not_whole_is_unnamed():
    alone = {name: shape for name, shape in SHAPES.items() if name != "h.7.k.bias"}
    assert StateMap(TABLE, alone).unnamed == ["h.7.q.bias"]


def test_a_weight_of_its_own_is_not_copied():
    weight = torch.zeros(3, 2)
    ((name, there),) = StateMap(rows({"embed": "wte"}, SAME), {"embed.weight": (3, 2)}).to(lambda _: weight)
    assert name == "wte.weight" and there is weight
