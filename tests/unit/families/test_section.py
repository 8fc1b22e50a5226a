from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from shardforge.families.section import apart, layers, plainer, tied, whole

NORM = {"kind": "rmsnorm", "eps": 1e-5}


def section(mixer: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "head_dim": 8, **(mixer or {})},
        "ffn": ffn or {"kind": "glu", "inner": 40},
        "residual": {"kind": "pre", "norm": NORM},
    }
    return whole({"vocab": 48, "hidden": 24, "blocks": {"dense": block}, "stack": ["dense x 3"], **top}, "the test")


def moe(**more: Any) -> dict[str, Any]:
    return {"kind": "moe", "experts": 4, "k": 2, "inner": 8, **more}


def rope(**more: Any) -> dict[str, Any]:
    return {"position": {"kind": "rope", **more}}


YARN = {"kind": "yarn", "factor": 4.0, "original_length": 16}
SAME = {
    "heads of keys that are as many": ({"mixer": {"kv_heads": 4}}, {}),
    "the scale that is usual": ({"mixer": {"scale": 8**-0.5}}, {}),
    "another way to compute": ({"core": "eager"}, {"core": "sdpa"}),
    "another start": ({"init": {"std": 0.5}}, {}),
    "a softmax over the chosen": (
        {"ffn": moe(router={"kind": "topk", "order": "topk_first", "bias": True})},
        {"ffn": moe(router={"kind": "topk", "order": "score_first", "bias": True})},
    ),
    "an ntk factor as a base": (
        {"mixer": rope(base=100.0, scaling={"kind": "ntk", "factor": 2.0})},
        {"mixer": rope(base=100.0 * 2.0 ** (8 / 6))},
    ),
    "the yarn factor that is usual": (
        {"mixer": rope(scaling=YARN)},
        {"mixer": rope(scaling=YARN | {"attention_factor": 1.1386294361119891})},
    ),
    "a loss in training": ({"ffn": moe(balance=[{"scope": "layers", "weight": 0.1}])}, {"ffn": moe()}),
}
OTHER = {
    "another base": ({"mixer": rope(base=100.0)}, {"mixer": rope(base=101.0)}, "layers.mixer.position.base"),
    "other pairs of channels": ({"mixer": rope(layout="interleaved")}, {}, "layers.mixer.position.layout"),
    "a bias": ({"mixer": {"bias": "qkv"}}, {}, "layers.mixer.bias"),
    "a softmax over chosen groups": (
        {"ffn": moe(router={"kind": "topk", "order": "topk_first", "groups": 2, "group_topk": 1})},
        {"ffn": moe(router={"kind": "topk", "order": "score_first", "groups": 2, "group_topk": 1})},
        "layers.ffn.router.order",
    ),
    "raw weights": (
        {"ffn": moe(router={"kind": "topk", "weights": "raw"})},
        {"ffn": moe()},
        "layers.ffn.router.weights",
    ),
    "a bias on the choice": (
        {"ffn": moe(router={"kind": "topk", "selection_bias": {}})},
        {"ffn": moe()},
        "layers.ffn.router.selection_bias",
    ),
    "another head": ({"head": "tied"}, {}, "head.kind"),
    "another depth": ({"stack": ["dense x 2"]}, {}, "layers.mixer.kind"),
}


@pytest.mark.parametrize("case", SAME)
def test_what_computes_the_same_is_not_apart(case):
    one, other = SAME[case]
    assert apart(section(**one), section(**other)) == []


@pytest.mark.parametrize("case", OTHER)
def test_what_computes_something_else_is_named(case):
    one, other, field = OTHER[case]
    assert field in [name for name, _, _ in apart(section(**one), section(**other))]


def test_a_field_that_differs_in_all_layers_is_named_once():
    (found,) = apart(section(mixer={"bias": "all"}), section())
    assert found == ("layers.mixer.bias", "all", "none")


def test_the_names_of_blocks_do_not_count():
    one = section()
    other = copy.deepcopy(one)
    other |= {"blocks": {"a": other["blocks"]["dense"], "b": other["blocks"]["dense"]}, "stack": ["a", "b x 2"]}
    assert apart(one, other) == []


def test_what_counts_in_training_alone_is_told_on_request():
    loss = [{"scope": "layers", "weight": 0.1}]
    found = [name for name, _, _ in apart(section(ffn=moe(balance=loss)), section(ffn=moe(z_loss=0.5)), training=True)]
    assert {re.split(r"[.\[]", name)[2] for name in found} == {"balance", "z_loss"}


def test_the_layers_are_in_the_order_of_the_stack():
    made = section()
    other = copy.deepcopy(made["blocks"]["dense"]) | {"ffn": {"kind": "glu", "inner": 1}}
    made |= {"blocks": made["blocks"] | {"thin": other}, "stack": ["(dense thin) x 2"]}
    assert [layer["ffn"]["inner"] for layer in layers(made)] == [40, 1, 40, 1]


@pytest.mark.parametrize(
    ("head", "expected"), [("tied", True), ("linear", False), ({"kind": "softcap", "cap": 3.0, "head": "tied"}, True)]
)
def test_a_head_is_tied_be_it_bent_or_not(head, expected):
    assert tied(section(head=head)) is expected


def test_a_position_without_ntk_is_plain_already():
    position = {"kind": "rope", "base": 7.0, "fraction": 0.5, "scaling": {"kind": "linear", "factor": 2.0}}
    assert plainer(position, 8) == position


def test_an_ntk_scaling_counts_the_channels_that_turn():
    position = {"kind": "rope", "base": 7.0, "fraction": 0.5, "scaling": {"kind": "ntk", "factor": 3.0}}
    assert plainer(position, 8) == {"kind": "rope", "base": 7.0 * 3.0 ** (4 / 2), "fraction": 0.5, "scaling": None}
