from __future__ import annotations

import contextlib
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Shard

from shardforge.core.layout import Layout
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.plan import fake
from shardforge.plan.dry_run import dry_run, held_of
from shardforge.plan.livebytes import LiveBytes
from shardforge.plan.rank import Rank
from shardforge.recipe.schema import Recipe
from tests.tiny import tiny

MOE = {"kind": "moe", "experts": 8, "k": 2, "inner": 8, "shared": {"kind": "glu", "inner": 8}}
LAYOUTS = ["one", "dp3", "rep2-tp2", "pp2-dp2", "cp2-tp2", "dp2-tp2-ep2-etp2", "pp2-dp2-ep2"]


def recipe(layout: str, **changes: Any) -> Recipe:
    place = Layout.parse(layout)
    model = {"stack": [f"one x {place.pp}"]} | changes.pop("model", {})
    changes = {"ffn": MOE, "train": {"steps": 1, "sequences": 12, "seq_len": 16}} | changes
    return tiny(layout=place, model=model, **changes)


def share(rank: Rank) -> Fraction:
    """Numbers that a rank holds, each divided by the ranks of its stage that hold the same."""
    total = Fraction(0)
    for weight in rank.model.parameters():
        pieces = 1
        if isinstance(weight, DTensor):
            for size, place in zip(weight.device_mesh.shape, weight.placements, strict=True):
                pieces *= size if isinstance(place, Shard) or hasattr(place, "split_factor") else 1
        total += Fraction((weight._local_tensor if pieces > 1 else weight).numel() * pieces, rank.layout.stage_size)
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_together_hold_every_weight_once(layout: str):
    one = recipe(layout, engine={"kind": "native", "schedule": "gpipe"})
    total = Fraction(0)
    for number in range(one.parallel.world_size):
        with fake.world(one.parallel.world_size, number) as mode:
            total += share(Rank(one, mode))
    assert total == flops.weights(build(one.model, one.objective.build()))


@pytest.mark.parametrize("layout", ["one", "dp2-tp2", "dp4-ep2", "pp2-dp2"])
def test_fake_tensors_take_the_bytes_of_real_ones(layout: str):
    """Of the ffn without experts, whose real shares are those of its router."""
    changes = {} if "ep" in layout else {"ffn": {"kind": "glu", "inner": 24}}
    one = recipe(layout, precision={"compute": "bf16"}, engine={"kind": "native", "schedule": "gpipe"}, **changes)
    with fake.world(one.parallel.world_size, 0) as mode:
        found = Rank(one, mode).bytes(0)
    with fake.world(one.parallel.world_size, 0):
        real = Rank(one, contextlib.nullcontext()).bytes(0)
    assert found == real


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_the_peak_is_within_8_percent_of_the_running_schedule(schedule: str, monkeypatch: pytest.MonkeyPatch):
    agreed = torch.ones(1, dtype=torch.int32)  # on given shapes: peers that are not there cannot vote
    for vote in ("_warmup_forward_vote", "_warmup_backward_result"):
        monkeypatch.setattr(PipelineStage, vote, lambda *args, **kwargs: agreed)
    one = tiny(
        layout=Layout(pp=2, dp_shard=2),
        model={"stack": ["one x 4"], "hidden": 64},
        train={"steps": 1, "sequences": 8, "seq_len": 128, "micro_batch": 1},
        engine={"kind": "native", "schedule": schedule, "zero": 1},
    )
    for number in (0, 2):
        found = dry_run(one, number)
        with fake.world(4, number):
            rank = Rank(one, contextlib.nullcontext())
            forward = rank.forward()
            forward.pieces = forward.pieces * 4
            with LiveBytes() as live:
                for weight in rank.model.parameters():
                    live.add(weight)
                rank.runner.train(forward)
        planned = found.peak(held_of(one, rank.cut, found)[1]) - found.optimizer
        assert live.peak == pytest.approx(planned, rel=0.08)


def test_recompute_keeps_less():
    plain, full = (dry_run(recipe("one", engine={"kind": "native", "recompute": kind}), 0) for kind in ("none", "full"))
    assert full.stages[0].kept < 0.5 * plain.stages[0].kept
    assert full.weights == plain.weights


def test_adamw_has_two_numbers_a_weight():
    found = dry_run(recipe("dp2"), 0)
    steps = 8 * len(list(build(recipe("one").model, recipe("one").objective.build()).parameters()))
    assert 2 * found.weights <= found.optimizer <= 2 * found.weights + steps


def test_gradients_are_as_large_as_weights():
    found = dry_run(recipe("dp2-tp2"), 3)
    assert found.gradients == found.weights


def test_more_shards_hold_less_each():
    two, four = (dry_run(recipe(layout), 0).weights for layout in ("dp2", "dp4"))
    assert four == pytest.approx(two / 2, rel=0.05)


def test_attention_keeps_no_scores():
    short, long = (
        dry_run(recipe("one", train={"steps": 1, "sequences": 1, "seq_len": length}), 0).stages[0].kept
        for length in (256, 1024)
    )
    assert long == pytest.approx(4 * short, rel=0.02)


def test_a_core_that_the_recipe_names_is_the_one_that_is_run():
    fused, eager = (
        dry_run(recipe("one", model={"core": core}, train={"steps": 1, "sequences": 1, "seq_len": 256}), 0)
        for core in ("auto", "eager")
    )
    assert eager.stages[0].kept > 2 * fused.stages[0].kept


@pytest.mark.parametrize("engine", [{"compiled": True}, {"offload": ["activations"]}, {"dispatch": "deepep"}], ids=str)
def test_what_needs_a_gpu_counts_as_without_it(engine: dict[str, Any]):
    plain = dry_run(recipe("dp2-ep2"), 0)
    assert dry_run(recipe("dp2-ep2", engine={"kind": "native", **engine}), 0) == plain


@pytest.mark.parametrize("core", ["flash", "flex"])
def test_fused_cores_need_no_package(core: str):
    assert dry_run(recipe("one", model={"core": core}), 0) == dry_run(recipe("one"), 0)


def test_a_process_with_a_process_group_is_left_alone():
    with fake.world(2, 0), pytest.raises(Exception, match="a dry run needs a process without a process group"):
        dry_run(recipe("one"), 0)


def test_loops_over_pieces_are_as_before_afterwards():
    from shardforge.nn import fused
    from shardforge.objective import cross_entropy

    before = fused.CACHED, dict(cross_entropy.CHUNK_BYTES)
    dry_run(recipe("one"), 0)
    assert (fused.CACHED, cross_entropy.CHUNK_BYTES) == before
    assert not torch.distributed.is_initialized()
