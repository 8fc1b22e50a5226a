from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import yaml

from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.core.options import option
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.recipe.load import from_mapping, load, shipped
from shardforge.recipe.rules import configs
from shardforge.recipe.schema import Recipe
from shardforge.verify.shrink import HIDDEN, Scale, counts, pooled, pools, resized, role, shrink, widths
from tests.tiny import GLU, GQA, mapping

REST: dict[str, Any] = {
    "data": {"sources": [{"path": "nowhere"}]},
    "schedule": {"kind": "constant", "lr": 0.01},
    "train": {"steps": 10, "sequences": 8, "seq_len": 4096},
    "parallel": {},
}
MODELS = [
    path for path in sorted(shipped().rglob("*.yaml")) if "model:" in path.read_text() and path.parent.name != "sweeps"
]


def large(**changes: Any) -> Recipe:
    """A recipe of real sizes."""
    mixer = GQA | {"heads": 64, "kv_heads": 8, "head_dim": 128, "mask": {"kind": "window", "size": 1024}}
    model = {"vocab": 32000, "hidden": 4096, "stack": ["one x 48"], "init": {"std": 0.02}}
    train = {"steps": 10, "sequences": 512, "seq_len": 4096}
    return from_mapping(mapping(mixer=mixer, ffn=GLU | {"inner": 14336}, model=model, train=train, **changes)).recipe


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_shipped_model_keeps_its_kinds_and_builds(path, tmp_path):
    recipe = tmp_path / "whole.yaml"
    recipe.write_text(
        yaml.safe_dump({"base": [str(path)], **REST} if path.parent.name == "models" else {"base": str(path)})
    )
    whole = load(recipe).recipe
    small = shrink(whole, [Layout(tp=3 if path.stem == "smollm2-135m" else 2), Layout(dp_shard=2)])  # it has 3 kv heads
    assert {type(config) for _, config in configs(small.model, "")} == {type(c) for _, c in configs(whole.model, "")}
    assert sum(item.count for item in declared(build(small.model, small.objective.build()))) < 1_000_000


def test_heads_keep_their_ratio():
    mixer = shrink(large(), [Layout(tp=2)]).model.blocks["one"].mixer
    assert (mixer.heads, mixer.kv_heads) == (16, 2)


def test_heads_are_as_many_as_the_layout_needs():
    mixer = shrink(large(), [Layout(tp=4)]).model.blocks["one"].mixer
    assert (mixer.heads, mixer.kv_heads) == (32, 4)


def test_key_value_heads_that_are_repeated_stay_repeated_on_fewer_ranks():
    mixer = shrink(large(), [Layout(tp=2)], full=[Layout(tp=16)]).model.blocks["one"].mixer
    assert mixer.kv_heads == 1


def test_a_window_keeps_its_share_of_the_sequence():
    small = shrink(large(), [Layout(dp_shard=2)])
    assert small.model.blocks["one"].mixer.mask.size * 4 == small.train.seq_len


def test_a_sequence_can_be_cut_for_every_layout():
    small = shrink(large(), [Layout(cp=3), Layout(cp=2, tp=2)])
    assert small.train.seq_len % 6 == 0 and small.train.seq_len % 8 == 0


def test_every_data_rank_has_two_sequences_for_each_stage():
    assert shrink(large(), [Layout(pp=2, dp_shard=2)], layers=4).train.sequences == 8


def test_matrices_start_wider_where_they_have_fewer_inputs():
    small = shrink(large(), [Layout(dp_shard=2)])
    assert small.model.init.std == pytest.approx(0.02 * (4096 / HIDDEN) ** 0.5)


def test_there_are_as_many_layers_as_a_pipeline_needs():
    assert len(shrink(large(), [Layout(pp=2)], layers=8).model.layers) == 8


def test_small_recipes_stay_as_they_are():
    tiny = from_mapping(mapping()).recipe
    small = shrink(tiny, [Layout(tp=2)])
    assert small.model.blocks == tiny.model.blocks and small.model.hidden == tiny.model.hidden


def test_no_small_model_is_an_error_with_what_was_missing():
    with pytest.raises(LayoutError, match=r"no small model of these kinds fits pp3: .*pp=3"):
        shrink(from_mapping(mapping()).recipe, [Layout(pp=3)], layers=6)


def test_experts_keep_their_ratio_and_more_than_one_is_chosen():
    assert counts([256, 8, 1], factor=1, least=2) == {1: 1, 8: 2, 256: 64}


def mixture(**changes: Any) -> Recipe:
    ffn = {"kind": "moe", "experts": 256, "k": 8, "inner": 2048, "shared": GLU | {"inner": 2048}} | changes
    return from_mapping(mapping(ffn=ffn, train=REST["train"])).recipe


@pytest.mark.parametrize(("experts", "k", "groups", "kept"), [(256, 8, 8, 4), (160, 6, 8, 3), (384, 8, 1, 1)])
@pytest.mark.parametrize("layout", ["dp2", "dp8-ep8", "dp3-ep3"])
def test_groups_of_experts_stay_those_of_the_large_model(experts, k, groups, kept, layout):
    router = {"kind": "topk", "groups": groups, "group_topk": kept}
    ffn = shrink(mixture(experts=experts, k=k, router=router), [Layout.parse(layout)]).model.blocks["one"].ffn
    small = ffn.router
    assert ffn.experts % small.groups == 0 and ffn.experts // ffn.k == experts // k
    assert (small.groups == 1) == (groups == 1) and small.groups * kept == small.group_topk * groups
    assert groups == 1 or ffn.k * kept == small.group_topk * k  # as many of each group


def test_pools_of_sequences_become_pairs_that_no_micro_batch_parts():
    balance = [{"scope": "sequence", "weight": 0.1, "sequences": 4}]
    layout = Layout(dp_shard=2)
    small = shrink(mixture(balance=balance), [layout])
    assert small.model.blocks["one"].ffn.balance[0].sequences == pooled(small) == 2
    assert small.train.sequences // layout.data_ranks // pools(small, layout) == 2
    assert pools(small, layout) == pools(shrink(mixture(), [layout]), layout)


def test_room_in_tokens_does_not_count_as_experts():
    small = shrink(mixture(capacity={"factor": 1.0, "min": 3}), [Layout(dp_shard=2)]).model.blocks["one"].ffn
    assert (small.experts, small.k, small.capacity.min) == (64, 2, 3)


def test_a_small_count_does_not_grow():
    assert counts([4, 2], factor=1, least=2) == {1: 1, 2: 2, 4: 4}


def test_widths_keep_their_order_and_equality_in_multiples_of_the_quantum():
    small = widths([64, 128, 128, 512, 1536, 7168, 18432], 7168, 4)
    assert sorted(small) == sorted(small, key=small.__getitem__)
    assert len(set(small.values())) == 6 and all(value % 4 == 0 for value in small.values())


@dataclass(frozen=True)
class Numbers:
    length: int = option(8, "keys seen", unit="tokens")
    inner: int = option(300, "between the projections")
    latent: int = option(300, "rank of the projection")
    experts: int = option(8, "to choose from")
    sequences: int = option(100, "rows that are one pool")
    kernel: int = option(4, "positions of the filter")
    buckets: int = option(100_000, "rows of the hash table")
    sunk: bool = option(True, "heads may look away")
    rest: float = option(0.5, "share of the heads")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length", "tokens"),
        ("inner", "width"),
        ("latent", "width"),
        ("experts", "count"),
        ("sequences", "rows"),
        ("kernel", "other"),
        ("buckets", "width"),
        ("sunk", "other"),
        ("rest", "other"),
    ],
)
def test_what_a_number_is_follows_from_its_field(name: str, expected: str):
    found = next(field for field in fields(Numbers) if field.name == name)
    assert role(found, getattr(Numbers(), name)) == expected


def test_a_kind_may_say_itself_how_it_shrinks():
    @dataclass(frozen=True)
    class Odd:
        size: int = 900

        def shrunk(self, scale: Scale) -> Odd:
            return Odd(scale.seq_len + 1)

    assert resized((Odd(),), Scale({}, {}, 100, 10)) == (Odd(11),)


@pytest.mark.parametrize(("value", "small"), [(4096, 32), (8192, 64), (2048, 16), (4095, 16), (100, 5), (3, 3)])
def test_lengths_keep_their_share_of_the_sequence_within_reason(value: int, small: int):
    assert Scale({}, {}, 4096, 32).tokens(value) == small
