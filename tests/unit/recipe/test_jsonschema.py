from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given, settings

from shardforge.core.options import option
from shardforge.core.slots import Slot
from shardforge.recipe.jsonschema import schema
from shardforge.recipe.provenance import plain
from shardforge.recipe.schema import Recipe
from tests.unit.recipe.stock import TEXT, kind
from tests.unit.recipe.test_provenance import recipes

TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "object": dict,
    "array": list,
}
KNOWN = {"$schema", "$defs", "title", "description", "default"}


def valid(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether `value` keeps `rule`; the part of draft 2020-12 that the schema uses, any other keyword is an error."""
    checks = {
        "$ref": lambda want: valid(value, root["$defs"][want.removeprefix("#/$defs/")], root),
        "type": lambda want: isinstance(value, TYPES[want]) and (type(value) is not bool or want == "boolean"),
        "enum": lambda want: any(option == value and type(option) is type(value) for option in want),
        "const": lambda want: want == value,
        "anyOf": lambda want: any(valid(value, option, root) for option in want),
        "oneOf": lambda want: sum(valid(value, option, root) for option in want) == 1,
        "required": lambda want: not isinstance(value, dict) or set(want) <= value.keys(),
        "properties": lambda want: not isinstance(value, dict)
        or all(valid(value[name], each, root) for name, each in want.items() if name in value),
        "additionalProperties": lambda want: not isinstance(value, dict)
        or all(want and valid(value[name], want, root) for name in value.keys() - rule.get("properties", {}).keys()),
        "propertyNames": lambda want: not isinstance(value, dict) or all(valid(name, want, root) for name in value),
        "items": lambda want: not isinstance(value, list) or all(valid(item, want, root) for item in value),
        "prefixItems": lambda want: not isinstance(value, list)
        or all(valid(item, each, root) for item, each in zip(value, want, strict=False)),
        "minItems": lambda want: not isinstance(value, list) or len(value) >= want,
        "maxItems": lambda want: not isinstance(value, list) or len(value) <= want,
        "minimum": lambda want: not isinstance(value, (int, float)) or value >= want,
        "maximum": lambda want: not isinstance(value, (int, float)) or value <= want,
        "exclusiveMinimum": lambda want: not isinstance(value, (int, float)) or value > want,
    }  # fmt: skip
    return all(checks[word](want) for word, want in rule.items() if word not in KNOWN)


def accepts(value: Any) -> bool:
    root = schema()
    return valid(value, root, root)


def test_schema_is_json_of_the_dialect_it_names():
    assert json.loads(json.dumps(schema())) == schema()
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@settings(max_examples=40)
@given(recipes())
def test_every_resolved_recipe_keeps_the_schema(recipe: Recipe):
    assert accepts(plain(recipe))


@pytest.mark.parametrize(
    "part",
    [
        {},
        {"base": "first"},
        {"base": ["a.yaml", "b.yaml"], "seed": 3},
        yaml.safe_load(TEXT),
        {"schedule": {"lr": 0.1}},
        {"schedule": {"kind": "constant"}},
        {"model": {"norm": "none"}},
        {"model": {"blocks": {"moe": None}}},
        {"parallel": {"tp": 2}},
        {"run_dir": None},
    ],
)
def test_a_part_of_a_recipe_keeps_the_schema(part: dict[str, Any]):
    assert accepts(part)


@pytest.mark.parametrize(
    "part",
    [
        {"sede": 3},
        {"base": 3},
        {"seed": -1},
        {"seed": "3"},
        {"seed": True},
        {"schedule": "cosnie"},
        {"schedule": {"kind": "constant", "rl": 0.1}},
        {"schedule": {"kind": "constant", "lr": 0}},
        {"schedule": {"rl": 0.1}},
        {"optim": {"kind": "adamw", "betas": [0.9]}},
        {"model": {"norm": {"kind": "rmsnorm", "heads": 3}}},
        {"train": {"seq_len": 1}},
        {"data": {"packing": "tight"}},
        {"parallel": {"sp": 2}},
    ],
)
def test_a_mistake_breaks_the_schema(part: dict[str, Any]):
    assert not accepts(part)


def test_descriptions_carry_meaning_and_unit():
    steps = schema()["$defs"]["TrainConfig"]["properties"]["steps"]
    assert steps["description"] == "optimizer steps of the whole run (steps)"


def test_a_kind_is_described_by_its_own_docstring():
    assert schema()["$defs"]["position.nope"]["description"] == "No position at all."


def test_a_kind_without_docstring_is_described_by_its_file():
    assert schema()["$defs"]["position.rope"]["description"].startswith("Kinds for recipe tests")


boxes = Slot("box", "nowhere")


@kind("nest")
@dataclass(frozen=True, kw_only=True)
class Nest:
    inside: Annotated[Any, boxes] | None = option(None, "a box in the box")


@dataclass(frozen=True, kw_only=True)
class Shelf:
    box: Annotated[Any, boxes] = "nest"


boxes._kinds, boxes._listed = {"nest": Nest}, True


def test_a_kind_may_hold_its_own_slot():
    assert set(schema(Shelf)["$defs"]) == {"box", "box.nest"}
