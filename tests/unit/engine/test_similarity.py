from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.engine import similarity
from shardforge.engine.native import NativeEngine
from shardforge.nn.init import matrix
from tests.equivalence.cases import whole
from tests.tiny import LENGTH, SEQUENCES, batch, part, tiny
from tests.tiny_kinds import GLU, MOE

SMALL = {"ffn": MOE | {"inner": 16, "shared": GLU}}  # 768 numbers an expert: all are compared
LARGE = {"ffn": MOE | {"inner": 64}}  # 3072: a third is
BIASED = {"ffn": MOE | {"bias": True}}
LAYOUTS = ["dp2", "rep2", "tp2", "dp2-ep2", "tp2-etp2", "dp4-ep2", "dp2-tp2-ep2-etp2", "rep2-dp2-ep2", "pp2-dp2-ep2"]
HALVES = {"train": {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH, "micro_batch": 2}}


def engine(layout: Layout, changes: Mapping[str, Any]) -> NativeEngine:
    recipe = tiny(layout=layout, **changes)
    return recipe.engine.build(recipe, torch.device("cpu"))


def told(layout: Layout, changes: Mapping[str, Any]) -> dict[int, float]:
    """After an update and an evaluation, as in training."""
    made = engine(layout, changes)
    mine = part(batch(), made.mesh.data_rank, layout.data_ranks)
    made.forward_backward(mine, 0)
    made.update(0.01)
    made.evaluate(mine)
    return made.similarity()


def between(weights: list[Tensor]) -> float:
    """The mean cosine of pairs, from the definition; one row an expert."""
    rows = torch.cat([weight.flatten(1) for weight in weights], 1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    pairs = [(rows[i] @ rows[j]).item() for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return sum(pairs) / len(pairs)


def defined(changes: Mapping[str, Any]) -> tuple[dict[int, float], list[float]]:
    made = engine(Layout(), changes)
    experts = [block.ffn.experts for block in made.model.blocks.values()]
    return made.similarity(), [between([whole(getattr(e, name)) for name in (*e.reads, "down")]) for e in experts]


def copied(share: float, lost: bool = False) -> dict[int, float]:
    """Every expert is the first one but for a `share` of its own; `lost`: the last one has only zeros."""
    made = engine(Layout(), SMALL)
    for block in made.model.blocks.values():
        for name in ("gate", "up", "down"):
            numbers = matrix(getattr(block.ffn.experts, name))
            numbers[1:] = (1 - share) * numbers[:1] + share * numbers[1:]
            numbers[-1] *= 0.0 if lost else 1.0
    return made.similarity()


@pytest.mark.parametrize("changes", [SMALL, BIASED], ids=["all", "biases-do-not-count"])
def test_it_is_the_mean_cosine_of_all_pairs(ranks, changes):
    found, expected = ranks(1).run(defined, changes)[0]
    tolerance = 1e-12 if changes is SMALL else 0.01  # of 1152 numbers 1024 are compared
    assert list(found.values()) == pytest.approx(expected, abs=tolerance)


def test_a_sample_of_a_large_expert_is_near_the_whole(ranks):
    found, expected = ranks(1).run(defined, LARGE)[0]
    assert list(found.values()) == pytest.approx(expected, abs=4 / similarity.SAMPLE**0.5)


def test_copies_are_alike(ranks):
    assert list(ranks(1).run(copied, 0.0)[0].values()) == pytest.approx([1.0, 1.0], rel=1e-12)


def test_an_expert_of_zeros_is_like_no_other(ranks):
    assert list(ranks(1).run(copied, 0.0, True)[0].values()) == pytest.approx([0.5, 0.5], rel=1e-12)


@pytest.mark.parametrize(
    ("layout", "changes"), [*((layout, SMALL) for layout in LAYOUTS), ("dp2-tp2-ep2-etp2", LARGE), ("dp2-ep2", BIASED)]
)
def test_any_layout_says_what_one_process_says(ranks, layout, changes):
    expected = ranks(1).run(told, Layout(), changes)[0]
    wanted = Layout.parse(layout)
    for found in ranks(wanted.world_size).run(told, wanted, changes | HALVES):
        assert found == pytest.approx(expected, rel=1e-10) and list(found) == [0, 1]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_weights_at_rest_are_read_at_every_level_of_sharding(ranks, zero):
    changes = SMALL | {"engine": {"kind": "native", "zero": zero}}
    expected = ranks(1).run(told, Layout(), SMALL)[0]
    assert ranks(2).run(told, Layout.parse("dp2"), changes)[1] == pytest.approx(expected, rel=1e-10)


def test_a_model_without_experts_has_none(ranks):
    assert ranks(2).run(told, Layout.parse("dp2"), {}) == [{}, {}]


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 3 * 2048 * 1408])
def test_a_sample_is_of_distinct_places_in_order(count):
    places = similarity.spread(count)
    assert len(places) <= similarity.SAMPLE and 0 <= places.min() and places.max() < count
    assert (places.diff() > 0).all()


@pytest.mark.parametrize("width", [1408, 2048, 4096])
def test_a_sample_does_not_run_along_a_row_or_a_column(width):
    places = similarity.spread(3 * 2048 * width)
    assert len((places % width).unique()) > 300 and len((places // width).unique()) > 900
