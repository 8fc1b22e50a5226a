from __future__ import annotations

import pytest

from shardforge.core.errors import LayoutError, Problems
from shardforge.core.layout import Layout
from shardforge.engine.fit import check_recipe
from tests.tiny import GLU, GQA, tiny


@pytest.mark.parametrize("layout", ["one", "dp4", "tp2", "tp4", "rep2-dp2-tp2"])
def test_a_layout_that_splits_every_dimension_fits(layout):
    check_recipe(tiny(layout=Layout.parse(layout)))


def test_one_dimension_that_does_not_split_is_named_once_with_its_weight_and_the_nearest_degree():
    with pytest.raises(LayoutError) as caught:
        check_recipe(tiny(layout=Layout(tp=4), mixer=GQA | {"heads": 12, "kv_heads": 6}))
    assert caught.value.what == "kv_heads=6 cannot be split 4 ways over tp (first in blocks.0.mixer.k.weight)"
    assert "tp=2 keeps the same 4 ranks with dp_shard=2" in caught.value.fix


def test_all_dimensions_that_do_not_split_are_named_together():
    with pytest.raises(Problems) as caught:
        check_recipe(tiny(layout=Layout(tp=4), mixer=GQA | {"heads": 12, "kv_heads": 6}, ffn=GLU | {"inner": 22}))
    assert [problem.what.split(" ")[0] for problem in caught.value.problems] == ["kv_heads=6", "ffn=22"]
