from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardforge.core.errors import ForgeError, LayoutError, Problems
from shardforge.core.layout import Layout
from shardforge.model.attention import AttentionCore
from shardforge.model.build import build
from shardforge.model.masks.causal import Causal
from shardforge.model.masks.window import Window
from shardforge.nn.batch import PADDING
from shardforge.nn.module import tagged
from shardforge.parallel import context
from shardforge.parallel.attention import chunks
from shardforge.parallel.attention.ring import visible_pairs
from tests.tiny import GLU, GQA, tiny

CP4 = Layout(cp=4)
NEAR = {"mixer": GQA | {"mask": {"kind": "window", "size": 4}}, "ffn": GLU}
FAR = {"mixer": GQA, "ffn": GLU}
MIXED = {"model": {"blocks": {"near": NEAR, "far": FAR}, "stack": ["near x 2", "far"]}}


def model(**changes: Any) -> nn.Module:
    recipe = tiny(**changes)
    return build(recipe.model, recipe.objective.build())


def refusal(made: nn.Module, method: str, layout: Layout = CP4) -> ForgeError:
    with pytest.raises(ForgeError) as caught:
        context.check(made, layout, method)
    return caught.value


@pytest.mark.parametrize("cp", [1, 2, 4, 3])
def test_every_place_is_held_by_one_rank(cp):
    held = torch.cat([context.zigzag(24, cp, rank) for rank in range(cp)])
    assert held.sort().values.tolist() == list(range(24))


def test_a_rank_holds_one_early_and_one_late_chunk():
    assert context.zigzag(16, 2, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert context.zigzag(16, 2, 1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


def test_a_length_that_cannot_be_cut_is_refused():
    with pytest.raises(LayoutError, match=r"18 tokens cannot be cut into 2 x 4 chunks over cp(.|\n)*like 16"):
        context.zigzag(18, 4, 0)


@pytest.mark.parametrize("cp", [2, 4])
def test_every_rank_has_the_same_causal_work(cp):
    assert len({(context.zigzag(32, cp, rank) + 1).sum().item() for rank in range(cp)}) == 1


@pytest.mark.parametrize("cp", [2, 4, 3])
def test_natural_order_is_restored_from_what_the_ranks_hold(cp):
    x = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
    joined = torch.cat([chunks.own(x, cp, rank, 1) for rank in range(cp)], 1)
    assert torch.equal(chunks.natural(joined, cp, 1), x)
    assert torch.equal(chunks.by_rank(x, cp, 1), joined)


def test_auto_takes_the_halo_for_windows_and_gathers_the_rest():
    found = [context.chosen(core, "auto") for core in tagged(model(**MIXED), "core")]
    assert found == ["halo", "halo", "gather"]


@pytest.mark.parametrize("method", ["gather", "ring", "ulysses"])
def test_a_named_method_is_taken_for_every_layer(method):
    assert {context.chosen(core, method) for core in tagged(model(**MIXED), "core")} == {method}


def test_the_plan_tells_for_each_layer_what_is_sent():
    told = context.describe(model(**MIXED), 2, "auto", 16)
    assert told == {
        "blocks.0.mixer.core": "halo: 3 tokens from before each chunk of 4",
        "blocks.1.mixer.core": "halo: 3 tokens from before each chunk of 4",
        "blocks.2.mixer.core": "gather: keys and values of all 16 tokens",
    }


def test_the_plan_tells_that_a_window_longer_than_a_chunk_is_gathered():
    told = context.describe(model(**MIXED), 4, "auto", 16)["blocks.0.mixer.core"]
    assert told == "gather: keys and values of all 16 tokens, because a window of 4 is longer than a chunk of 2"


def test_the_plan_of_ring_and_ulysses_tells_what_a_rank_holds():
    assert "of 4 tokens at a time, 4 times" in context.describe(model(), 4, "ring", 16)["blocks.0.mixer.core"]
    assert "all 16 tokens of 1/4 of the heads" in context.describe(model(), 4, "ulysses", 16)["blocks.0.mixer.core"]


def test_a_run_tells_each_way_once_with_its_layers(caplog):
    with caplog.at_level("INFO", "shardforge.engine"):
        context.tell(model(**MIXED), Layout(cp=2), "auto", 16)
        context.tell(model(**MIXED), Layout(dp_shard=2), "auto", 16)
    assert [record.message for record in caplog.records] == [
        "cp=2, 2 of 3 layers: halo: 3 tokens from before each chunk of 4",
        "cp=2, 1 of 3 layers: gather: keys and values of all 16 tokens",
    ]


def test_a_mixer_without_an_attention_core_is_refused_by_kind_and_place():
    made = model()
    del made.blocks["1"].mixer.core
    error = refusal(made, "auto")
    assert isinstance(error, LayoutError) and error.where == "blocks.1.mixer"
    assert "GQA mixes positions without an attention core, and cp=4 ranks share each sequence" in str(error)
    assert "parallel.cp: 1 keeps the same 4 ranks with dp_shard=4" in error.fix


def test_a_core_that_cannot_do_it_is_refused_with_what_works(monkeypatch):
    monkeypatch.setattr(AttentionCore, "exchanges", ("gather",))
    made = model(model={"stack": ["one"]})
    error = refusal(made, "ring")
    assert "the core SDPA of GQA cannot share a sequence by ring" in error.what
    assert "engine.context: gather; parallel.cp: 1" in error.fix
    context.check(made, CP4, "auto")


def test_ulysses_refuses_heads_that_cp_does_not_divide_with_a_degree_that_does():
    error = refusal(
        model(model={"stack": ["one"]}, mixer=GQA | {"heads": 12, "kv_heads": 4}), "ulysses", Layout(cp=4, tp=2)
    )
    assert "6 query heads on each tp rank cannot be traded 4 ways over cp by ulysses" in error.what
    assert "parallel.cp: 2, which divides 6" in error.fix


def test_ulysses_takes_fewer_kv_heads_than_ranks():
    context.check(model(mixer=GQA | {"heads": 8, "kv_heads": 2}), CP4, "ulysses")


def test_all_mixers_that_do_not_fit_are_told_at_once():
    made = model()
    for block in made.blocks.values():
        del block.mixer.core
    error = refusal(made, "gather")
    assert isinstance(error, Problems) and len(error.problems) == 2


def pairs(mask: object, documents: torch.Tensor, cp: int) -> list[int]:
    """Blocks that each rank computes: visible pairs of its two chunks of queries with all chunks of keys."""
    found = visible_pairs(mask, documents, cp)
    return [sum(sum(found[number]) for number in chunks.held(cp, rank)) for rank in range(cp)]


@pytest.mark.parametrize("cp", [2, 4])
def test_a_causal_ring_computes_half_of_the_blocks_and_as_many_on_each_rank(cp):
    assert pairs(Causal(), torch.zeros(1, 32, dtype=torch.int64), cp) == [2 * cp + 1] * cp


def test_a_windowed_ring_computes_the_blocks_in_reach():
    documents = torch.zeros(1, 32, dtype=torch.int64)  # chunks of 4
    assert sum(pairs(Window(size=1), documents, 4)) == 8
    assert sum(pairs(Window(size=2), documents, 4)) == 8 + 7
    assert sum(pairs(Window(size=5), documents, 4)) == 8 + 7
    assert sum(pairs(Window(size=6), documents, 4)) == 8 + 7 + 6


def test_a_ring_skips_blocks_without_a_common_document_in_any_row():
    documents = torch.tensor([[0] * 8 + [1] * 8 + [2] * 8 + [PADDING] * 8, [0] * 16 + [1] * 16])
    assert sum(pairs(Causal(), documents[:1], 4)) == 8 + 4
    assert sum(pairs(Causal(), documents, 4)) == 8 + 2 * 6
