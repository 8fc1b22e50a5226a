from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardforge.core.errors import RecipeError
from shardforge.recipe.build import plain_data
from shardforge.recipe.tree import Node, Origin, merge, override, read, wrap

HERE = Origin("here")


def no_names(name: str) -> Path:
    raise RecipeError(f"there is no recipe {name!r}", "", "look again")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree_of(folder: Path, text: str) -> Node:
    (folder / "x.yaml").write_text(text)
    tree, problems = read(Path("x.yaml"), no_names)
    assert problems == []
    return tree


def value_of(folder: Path, text: str) -> Any:
    return plain_data(tree_of(folder, f"x: {text}"))["x"]


def merged(low: Any, high: Any) -> Any:
    return plain_data(merge(wrap(low, HERE), wrap(high, HERE)))


def mistakes(folder: Path, text: str) -> list[str]:
    (folder / "x.yaml").write_text(text)
    return [str(problem) for problem in read(Path("x.yaml"), no_names)[1]]


def test_values_remember_file_line_and_column(folder: Path):
    tree = tree_of(folder, "a:\n  b: [1, 20]\n")
    assert str(tree.value["a"].value["b"].value[1].origin) == "x.yaml:2:10"


def test_keys_remember_where_they_stand(folder: Path):
    assert str(tree_of(folder, "a:\n  bc: 1\n").value["a"].keys["bc"]) == "x.yaml:2:3"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("100_000_000", 100_000_000),
        ("-3", -3),
        ("0x10", 16),
        ("3.0e-4", 3e-4),
        ("1_000.5", 1000.5),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("word", "word"),
        ("'5'", "5"),
    ],
)
def test_plain_values_are_read(folder: Path, text: str, value: Any):
    found = value_of(folder, text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text", ["yes", "on", "off", "No", "3e-4", "1:30", "1:30.5", "010", "0b11", "2024-01-01", "=", "<<"]
)
def test_what_yaml_1_1_would_turn_into_something_stays_text(folder: Path, text: str):
    assert value_of(folder, text) == text


def test_an_empty_file_says_nothing(folder: Path):
    assert tree_of(folder, "# only a comment\n").value == {}


def test_a_byte_order_mark_is_not_part_of_the_first_key(folder: Path):
    (folder / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert list(read(Path("x.yaml"), no_names)[0].value) == ["a"]


def test_a_list_is_no_recipe(folder: Path):
    with pytest.raises(RecipeError, match=r"x\.yaml:1:1  recipe: expected a mapping of sections, got a list"):
        tree_of(folder, "[1]\n")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1,\nb: 2\n", "x.yaml:3:1"),
        ("a: 1\n\tb: 2\n", "x.yaml:2:1"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1"),
        ("a: *b\n", "x.yaml:1:4"),
    ],
)
def test_broken_yaml_names_its_line_and_column(folder: Path, text: str, place: str):
    with pytest.raises(RecipeError) as caught:
        tree_of(folder, text)
    assert caught.value.where == place and caught.value.what.startswith("this is not YAML")


def test_a_control_character_is_refused(folder: Path):
    with pytest.raises(RecipeError, match="this is not YAML"):
        tree_of(folder, "a: \x01\n")


def test_bytes_that_are_not_utf8_are_refused(folder: Path):
    (folder / "x.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match="byte 3 is not UTF-8"):
        read(Path("x.yaml"), no_names)


def test_a_folder_cannot_be_read(folder: Path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read(folder, no_names)


def test_a_repeated_key_names_both_places(folder: Path):
    assert mistakes(folder, "a:\n  b: 1\n  b: 2\n") == [
        "x.yaml:3:3  a: 'b' is given twice, first at x.yaml:2:3\n    fix: keep one of them"
    ]


def test_all_repeated_keys_are_found_at_once(folder: Path):
    assert len(mistakes(folder, "a: {b: 1, b: 2}\nc: {d: 1, d: 2}\n")) == 2


def test_an_anchor_may_be_used_again(folder: Path):
    assert plain_data(tree_of(folder, "a: &x {b: 1}\nc: *x\n")) == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [*x]", "an alias stands inside its own anchor"),
        ("a: !!python/object:os.system {}", "tags like"),
        ("a: !mine 3", "tags like !mine mean nothing here"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "merge keys"),
        ("? [1, 2]\n: 3", "a key must be a word"),
    ],
)
def test_yaml_beyond_plain_data_is_a_mistake(folder: Path, text: str, message: str):
    (found,) = mistakes(folder, text)
    assert message in found


def test_bases_merge_left_to_right_under_the_file(folder: Path):
    (folder / "a.yaml").write_text("x: 1\ny: 1\nz: 1\n")
    (folder / "b.yaml").write_text("y: 2\nz: 2\n")
    assert plain_data(tree_of(folder, "base: [a.yaml, b.yaml]\nz: 3\n")) == {"x": 1, "y": 2, "z": 3}


def test_a_base_stands_relative_to_the_file_that_names_it(folder: Path):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "a.yaml").write_text("base: er/b.yaml\n")
    (folder / "deep" / "er" / "b.yaml").write_text("x: 1\n")
    assert str(tree_of(folder, "base: deep/a.yaml\n").value["x"].origin) == "deep/er/b.yaml:1:4"


def test_a_base_that_is_no_file_is_looked_up_by_name(folder: Path):
    (folder / "far.yaml").write_text("x: 1\n")
    (folder / "x.yaml").write_text("base: somewhere\n")
    tree, _ = read(Path("x.yaml"), {"somewhere": folder / "far.yaml"}.__getitem__)
    assert plain_data(tree) == {"x": 1}


def test_an_unknown_base_names_the_line_that_asks_for_it(folder: Path):
    with pytest.raises(RecipeError) as caught:
        tree_of(folder, "a: 1\nbase: [gone]\n")
    assert str(caught.value) == "x.yaml:2:8  base: there is no recipe 'gone'\n    fix: look again"


def test_a_base_must_be_a_name(folder: Path):
    with pytest.raises(RecipeError, match="base: expected a path or a name, got int 3"):
        tree_of(folder, "base: [3]\n")


def test_a_circle_of_bases_is_named_in_full(folder: Path):
    (folder / "y.yaml").write_text("base: x.yaml\n")
    with pytest.raises(RecipeError) as caught:
        tree_of(folder, "base: y.yaml\n")
    assert str(caught.value).startswith("y.yaml:1:7  base: a recipe cannot stand on itself: x.yaml -> y.yaml -> x.yaml")


def test_two_bases_may_share_one(folder: Path):
    (folder / "low.yaml").write_text("x: 1\n")
    (folder / "a.yaml").write_text("base: low.yaml\n")
    (folder / "b.yaml").write_text("base: low.yaml\n")
    assert plain_data(tree_of(folder, "base: [a.yaml, b.yaml]\n")) == {"x": 1}


@pytest.mark.parametrize(
    ("low", "high", "result"),
    [
        ({"a": {"b": 1, "c": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ],
    ids=["mappings merge", "lists replace", "null replaces", "null is replaced"],
)
def test_later_values_win(low: Any, high: Any, result: Any):
    assert merged(low, high) == result


@pytest.mark.parametrize(
    ("low", "high", "result"),
    [
        ({"kind": "rope", "base": 5}, {"kind": "nope"}, {"kind": "nope"}),
        ({"kind": "rope", "base": 5}, {"kind": "rope", "part": 1}, {"kind": "rope", "base": 5, "part": 1}),
        ({"kind": "rope", "base": 5}, {"base": 6}, {"kind": "rope", "base": 6}),
        ({"kind": "rope", "base": 5}, "nope", {"kind": "nope"}),
        ({"kind": "rope", "base": 5}, "rope", {"kind": "rope", "base": 5}),
        ("rope", {"base": 6}, {"kind": "rope", "base": 6}),
        ("rope", {"kind": "nope", "x": 1}, {"kind": "nope", "x": 1}),
        ("rope", "nope", "nope"),
    ],
)
def test_a_different_kind_replaces_the_whole_value_and_the_same_kind_merges(low: Any, high: Any, result: Any):
    assert merged({"position": low}, {"position": high}) == {"position": result}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a.b=2", {"a": {"b": 2, "kind": "k"}, "s": [{"p": "x"}]}),
        ("a.c.d=[1, z]", {"a": {"b": 1, "kind": "k", "c": {"d": [1, "z"]}}, "s": [{"p": "x"}]}),
        ("a=other", {"a": {"kind": "other"}, "s": [{"p": "x"}]}),
        ("a.kind=other", {"a": {"kind": "other"}, "s": [{"p": "x"}]}),
        ("s.0.p=y", {"a": {"b": 1, "kind": "k"}, "s": [{"p": "y"}]}),
        ("s=[{p: 1}, {p: 2}]", {"a": {"b": 1, "kind": "k"}, "s": [{"p": 1}, {"p": 2}]}),
        ("a=", {"a": None, "s": [{"p": "x"}]}),
        ("new.x=a=b", {"a": {"b": 1, "kind": "k"}, "s": [{"p": "x"}], "new": {"x": "a=b"}}),
    ],
)
def test_set_puts_a_value_over_the_tree(text: str, result: Any):
    tree = wrap({"a": {"b": 1, "kind": "k"}, "s": [{"p": "x"}]}, HERE)
    assert plain_data(override(tree, text)) == result


def test_a_set_value_says_so():
    tree = override(wrap({"a": {"b": 1}}, HERE), "a.b=2")
    assert str(tree.value["a"].value["b"].origin) == "--set a.b=2"


def test_what_is_not_set_keeps_its_place():
    tree = override(wrap({"a": {"b": 1, "c": 1}}, HERE), "a.b=2")
    assert (tree.value["a"].origin, tree.value["a"].value["c"].origin) == (HERE, HERE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.b", "--set a.b  this sets nothing\n    fix: write --set section.field=value"),
        ("a..b=1", "--set a..b=1  this sets nothing\n    fix: write --set section.field=value"),
        ("s.1.p=y", "--set s.1.p=y  s: no item '1' in a list of 1\n    fix: choose from 0 to 0"),
        ("s.p=y", "--set s.p=y  s: no item 'p' in a list of 1\n    fix: choose from 0 to 0"),
    ],
)
def test_a_set_that_cannot_be_is_explained(text: str, message: str):
    with pytest.raises(RecipeError) as caught:
        override(wrap({"a": {}, "s": [{"p": "x"}]}, HERE), text)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["a=[1", "a={b: 1, b: 2}", "a=!x 1"])
def test_a_set_value_is_checked_like_a_file(text: str):
    with pytest.raises(RecipeError) as caught:
        override(wrap({}, HERE), text)
    assert caught.value.where == f"--set {text}"


def test_overriding_leaves_the_tree_it_was_given_alone():
    tree = wrap({"a": {"b": 1}, "s": [1]}, HERE)
    override(override(tree, "a.b=2"), "s.0=2")
    assert plain_data(tree) == {"a": {"b": 1}, "s": [1]}
