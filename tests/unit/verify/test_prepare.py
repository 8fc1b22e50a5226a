from __future__ import annotations

import dataclasses

import pytest

from shardforge.core.errors import ForgeError, LayoutError
from shardforge.core.layout import Layout
from shardforge.recipe.schema import Recipe
from shardforge.verify.cases import Case
from shardforge.verify.prepare import Wanted, allowed_axes, companion, prepare
from tests.tiny import GQA, tiny

MOE = {"kind": "moe", "experts": 4, "k": 2, "inner": 8}


def on(layout: str, **changes) -> Recipe:
    return tiny(layout=Layout.parse(layout), **changes)


def test_without_a_layout_it_is_the_recipes_own():
    _, _, listed = prepare(on("dp2"), Wanted())
    assert listed == [Case(Layout(dp_shard=2))]


def test_layouts_that_are_named_replace_it():
    _, _, listed = prepare(on("dp2"), Wanted(layouts=(Layout(tp=2), Layout(cp=2))))
    assert [str(case) for case in listed] == ["tp2", "cp2"]


def test_accumulation_of_the_recipe_is_kept():
    train = {"steps": 2, "sequences": 64, "seq_len": 16, "micro_batch": 4}
    _, _, listed = prepare(on("dp2", train=train), Wanted())
    assert listed[0].micro_batches == 2


def test_a_layout_that_is_too_large_is_replaced_by_smaller_ones():
    recipe = on("dp64-tp8", mixer=GQA | {"heads": 8, "kv_heads": 8}, train={"steps": 2, "sequences": 64, "seq_len": 16})
    plan, _, listed = prepare(recipe, Wanted())
    assert [str(case) for case in listed] == ["dp2-tp2"]
    assert plan.unproved == ("dp 64 is verified at 2", "tp 8 is verified at 2")


def test_a_layout_that_the_recipe_cannot_have_is_refused():
    with pytest.raises(ForgeError, match="8 sequences cannot be shared evenly by 3 data ranks"):
        prepare(tiny(), Wanted(layouts=(Layout(dp_shard=3),)))


def test_expert_axes_are_there_where_experts_are():
    assert allowed_axes(tiny()) == ["pp", "dp_replicate", "dp_shard", "cp", "tp"]
    assert allowed_axes(tiny(ffn=MOE))[-2:] == ["ep", "etp"]


def test_every_case_of_a_sample_is_one_that_the_engine_takes():
    _, small, listed = prepare(tiny(model={"stack": ["one x 8"]}), Wanted(every=True, processes=2))
    assert {case.layout.world_size for case in listed} == {2}
    assert {"gpipe", "1f1b", "zbv", "dualpipev"} <= {dict(case.options).get("schedule") for case in listed}
    assert len(small.model.layers) >= 4


def test_one_process_is_too_few_for_a_sample():
    with pytest.raises(LayoutError, match="too few"):
        prepare(tiny(), Wanted(every=True, processes=1))


def test_each_case_hands_its_checkpoint_to_the_next():
    cases = [Case(Layout(dp_shard=2)), Case(Layout(tp=2), (("overlap", True),))]
    assert [companion(each, cases, tiny()) for each in cases] == [cases[1], cases[0]]


@pytest.mark.parametrize(("layout", "other"), [("tp2", "dp2"), ("dp2", "one"), ("one", "one")])
def test_a_single_layout_hands_it_to_data_ranks_or_to_one_process(layout: str, other: str):
    only = Case(Layout.parse(layout))
    assert str(companion(only, [only], tiny())) == other


def test_data_ranks_that_the_batch_cannot_feed_are_no_companion():
    small = tiny()
    small = dataclasses.replace(small, train=dataclasses.replace(small.train, sequences=2))
    assert companion(Case(Layout(tp=4)), [Case(Layout(tp=4))], small) == Case(Layout())
