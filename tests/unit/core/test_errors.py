from __future__ import annotations

import pickle

import pytest

from shardforge.core import errors
from shardforge.core.errors import ForgeError, LayoutError, Problems, RecipeError, suggest

CHILDREN = (
    errors.RecipeError,
    errors.LayoutError,
    errors.DataError,
    errors.CheckpointError,
    errors.EngineError,
    errors.LaunchError,
)
TWO = Problems(
    [RecipeError("no field 'cpp'", "a.yaml:9:3", "did you mean 'pp'?"), LayoutError("does not fit")], "x.yaml"
)


def test_error_prints_where_what_and_fix():
    assert str(ForgeError("too wide", "a.yaml:1:2", "write 3")) == "a.yaml:1:2  too wide\n    fix: write 3"


def test_error_without_place_or_fix_is_its_sentence():
    assert str(ForgeError("too wide")) == "too wide"


@pytest.mark.parametrize("kind", CHILDREN)
def test_every_kind_of_error_survives_another_process(kind: type[ForgeError]):
    error = pickle.loads(pickle.dumps(kind("what", "where", "fix")))
    assert (type(error), str(error)) == (kind, str(kind("what", "where", "fix")))


def test_problems_print_their_count_and_each_one_indented():
    assert str(TWO).splitlines() == [
        "2 problems in x.yaml",
        "  a.yaml:9:3  no field 'cpp'",
        "      fix: did you mean 'pp'?",
        "  does not fit",
    ]


def test_a_single_problem_is_counted_in_the_singular():
    assert str(Problems([RecipeError("x")])).startswith("1 problem in the recipe")


def test_problems_survive_another_process():
    assert str(pickle.loads(pickle.dumps(TWO))) == str(TWO)


def test_suggestion_is_the_nearest_name():
    assert suggest("swigul", ["gelu", "swiglu"]) == "did you mean 'swiglu'?"


def test_suggestion_lists_all_names_when_none_is_near():
    assert suggest("zzz", ["b", "a"]) == "choose from a, b"


def test_no_suggestion_without_options():
    assert suggest("x", []) == ""
