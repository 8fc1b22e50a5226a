from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from shardforge.precision.types import DTYPES
from shardforge.recipe.rules import WIDTHS
from shardforge.recipe.schema import PrecisionConfig


@pytest.mark.parametrize("field", ["master", "compute", "reduce"])
def test_every_type_that_a_recipe_may_name_is_a_type_of_torch(field):
    assert set(get_args(get_type_hints(PrecisionConfig)[field])) <= set(DTYPES)


@pytest.mark.parametrize("name", DTYPES)
def test_a_type_has_the_width_that_the_rules_take_it_to_have(name):
    assert DTYPES[name].itemsize * 8 == WIDTHS[name]
