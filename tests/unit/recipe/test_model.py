from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardforge.core.errors import Problems, RecipeError
from shardforge.recipe.load import from_mapping
from shardforge.recipe.model import expand
from tests.unit.recipe.stock import TEXT

BASE = {"name": "x", **yaml.safe_load(TEXT)}


@pytest.mark.parametrize(
    ("item", "layers"),
    [
        ("dense", ["dense"]),
        ("moe x 3", ["moe"] * 3),
        ("moe x 03", ["moe"] * 3),
        ("(near far) x 2", ["near", "far", "near", "far"]),
        ("(near far)", ["near", "far"]),
        ("( near  far )x 1", ["near", "far"]),
        ("(near x 2 far) x 2", ["near", "near", "far"] * 2),
        ("((near far) x 2 dense) x 2", ["near", "far", "near", "far", "dense"] * 2),
        ("x x 2", ["x", "x"]),
        ("a block x 2", ["a block"] * 2),
    ],
)
def test_an_item_of_a_stack_says_its_layers(item: str, layers: list[str]):
    assert list(expand(item)) == layers


COUNTS = ["near x 0", "near x two", "near x -1", "near x 2 x 2", "near x 1.5", "(near far) x", "(near far) y 2"]
PARENTHESES = [
    "()",
    ")",
    "(",
    "(near far",
    "near far)",
    "(near far x 2",
    "(near ()) x 2",
    "(near x 0 far)",
    "(a b) x 2 c",
]


@pytest.mark.parametrize("item", ["", " ", *COUNTS, *PARENTHESES])
def test_an_item_that_cannot_be_read_is_refused_with_what_can(item: str):
    with pytest.raises(
        RecipeError, match=r"model.stack  cannot read .*\n    fix: write a block name, 'name x 12' or '\(one"
    ):
        expand(item)


@given(st.text(alphabet="()x2a ", max_size=12))
def test_any_text_is_read_or_refused(item: str):
    with contextlib.suppress(RecipeError):
        assert all(name in item for name in expand(item))


def test_blocks_side_by_side_without_parentheses_are_told_to_get_them():
    blocks = {"near": BASE["model"]["blocks"]["dense"], "far": BASE["model"]["blocks"]["dense"]}
    with pytest.raises(Problems) as caught:
        from_mapping({**BASE, "model": {**BASE["model"], "blocks": blocks, "stack": ["near far x 2"]}})
    (error,) = caught.value.problems
    assert (error.what, error.fix) == (
        "model.stack: no block is called 'near far'",
        "write '(near far)' for one after another",
    )


def test_a_group_that_names_no_block_is_told_once_for_each_name():
    model = {**BASE["model"], "stack": ["(dense far near far) x 2"]}
    with pytest.raises(Problems) as caught:
        from_mapping({**BASE, "model": model})
    assert [error.what for error in caught.value.problems] == [
        "model.stack: no block is called 'far'",
        "model.stack: no block is called 'near'",
    ]


def test_blocks_of_an_item_that_cannot_be_read_are_not_told_to_be_left_out():
    model = {**BASE["model"], "stack": ["(dense x 2"]}
    with pytest.raises(Problems) as caught:
        from_mapping({**BASE, "model": model})
    assert [error.what for error in caught.value.problems] == ["model.stack: cannot read '(dense x 2'"]


def test_layers_are_those_of_all_items_in_order():
    model = {**BASE["model"], "stack": ["dense", "(dense) x 2"]}
    assert from_mapping({**BASE, "model": model}).recipe.model.layers == ("dense",) * 3
