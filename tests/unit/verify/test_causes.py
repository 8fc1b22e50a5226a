"""Patterns that need no ranks; test_verify.py beside the layouts has the mistakes that make the others."""

from __future__ import annotations

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.layout import Layout
from shardforge.verify.causes import cause, times
from shardforge.verify.compare import Evidence, compare
from shardforge.verify.measure import Found, Key

DIMS = {
    "embed.weight": (Dim("vocab", 8), Dim("hidden", 2)),
    "norm.weight": (Dim("hidden", 2),),
    "blocks.0.ffn.router.weight": (Dim("router", 4), Dim("hidden", 2)),
    "blocks.0.ffn.experts.up": (Dim("expert", 4), Dim("hidden", 2)),
    "head.weight": (Dim("vocab", 8), Dim("hidden", 2)),
}
ORDER = list(DIMS)


def step(phase: str = "step 1") -> dict[Key, Tensor]:
    """What one process finds in a step."""
    generator = torch.Generator().manual_seed(1)
    out: dict[Key, Tensor] = {(phase, "loss", ""): torch.tensor(3.0), (phase, "term", "balance"): torch.tensor(0.5)}
    out |= {(phase, "gradient", name): torch.randn(4, generator=generator) for name in DIMS}
    return out | {(phase, "weight", name): torch.randn(4, generator=generator) for name in DIMS}


def told(layout: str, changes: dict[Key, Tensor], want: dict[Key, Tensor] | None = None) -> tuple[str, str]:
    want = {key: value.double() for key, value in (want or step()).items()}
    _, _, differences = compare([Found(want | {key: value.double() for key, value in changes.items()})], want)
    return cause(Evidence(Layout.parse(layout), {}, want, differences, DIMS, ORDER))


def scaled(factor: float, *names: str) -> dict[Key, Tensor]:
    return {key: factor * value for key, value in step().items() if key[1] == "gradient" and key[2] in (names or DIMS)}


def test_all_gradients_times_a_degree_name_the_axis():
    assert told("dp4-tp2", scaled(4.0)) == (
        "multiple",
        "gradients of all weights are counted 4 times over dp: "
        "blocks.0.ffn.experts.up, blocks.0.ffn.router.weight, embed.weight and 2 more",
    )


def test_a_mean_instead_of_a_sum_is_a_part():
    assert "counted 1/2 times over tp" in told("dp4-tp2", scaled(0.5))[1]


def test_a_product_of_two_degrees_names_both_axes():
    assert "counted 8 times over dp x tp" in told("dp4-tp2", scaled(8.0))[1]


def routed(phase: str = "step 1") -> dict[Key, Tensor]:
    """What one process finds of experts beside the rest."""
    load, bias = torch.tensor([6.0, 2.0]), torch.tensor([-1.0, 1.0])
    return {(phase, "expert load", "of layer 3"): load, (phase, "remembered", "blocks.3.ffn.router.bias"): bias}


def test_loads_that_are_counted_twice_name_the_axis():
    wrong = {key: 2 * value for key, value in routed().items() if key[1] == "expert load"}
    assert told("tp2", wrong, step() | routed()) == (
        "loads",
        "the tokens of the experts of layer 3 are counted twice over tp; the loss is right",
    )


def test_what_is_remembered_is_not_blamed_on_the_loads():
    wrong = {key: -value for key, value in routed().items() if key[1] == "remembered"}
    rule, says = told("dp2", wrong, step() | routed())
    assert rule == "remembered" and "depends on the layout: blocks.3.ffn.router.bias" in says


def test_loads_that_follow_from_a_wrong_forward_pass_are_not_the_cause():
    wrong = {key: 2 * value for key, value in routed().items()} | {("step 1", "loss", ""): torch.tensor(3.5)}
    assert told("dp2", wrong, step() | routed())[0] not in ("loads", "remembered")


def test_routers_alone_are_named():
    noise = {("step 1", "gradient", "blocks.0.ffn.router.weight"): torch.arange(4.0)}
    assert told("dp2", noise) == ("some", "only the gradients of routers differ")


def test_a_zero_gradient_is_lost():
    assert told("dp2", scaled(0.0, "norm.weight")) == ("lost", "gradients are lost: norm.weight got zero")


def test_a_term_that_is_counted_twice_is_named_while_the_loss_is_right():
    changes = {("step 1", "term", "balance"): torch.tensor(1.0)}
    assert told("tp2", changes) == ("terms", "the term balance is counted twice over tp; the loss is right")


def test_a_wrong_loss_before_any_step_is_the_forward_pass():
    want = step() | {("start", "loss", ""): torch.tensor(3.0)}
    changes = {("start", "loss", ""): torch.tensor(3.1), ("step 1", "loss", ""): torch.tensor(3.1)}
    assert told("dp2", changes, want)[0] == "forward"


def test_a_wrong_training_loss_with_right_evaluation_is_dropout_or_a_denominator():
    want = step() | {("start", "loss", ""): torch.tensor(3.0)}
    name, said = told("dp2", {("step 1", "loss", ""): torch.tensor(3.1)}, want)
    assert name == "forward" and "dropout" in said


def test_the_last_wrong_gradient_of_the_forward_pass_is_where_the_backward_pass_goes_wrong():
    names = ("embed.weight", "norm.weight", "blocks.0.ffn.experts.up")
    noise = {("step 1", "gradient", name): torch.arange(4.0) for name in names}
    name, said = told("dp2", noise)
    assert name == "backward" and "the backward pass meets blocks.0.ffn.experts.up first" in said


def test_a_pattern_that_is_not_known_says_so():
    want = step() | {("step 1", "gradient norm", ""): torch.tensor(1.0)}
    later = step("step 2")
    changes = {key: value + 1 for key, value in later.items() if key[1] == "loss"}
    assert told("dp2", changes, want | later) == ("unknown", "the pattern fits nothing that is known here")


def test_factors_print_as_words():
    assert [times(ratio) for ratio in (2.0, 4.0, 0.5, 1.37)] == ["twice", "4 times", "1/2 times", "1.37 times"]
