from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shardforge.model import flops
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from tests.tiny import GLU, GQA, LENGTH, VOCAB, tiny
from tests.tiny_kinds import MOE, OPTIONS

CASES = {
    "plain": {},
    "grouped-heads": {"mixer": GQA | {"heads": 8}},
    "wide-heads": {"mixer": GQA | {"head_dim": 10}},
    "tied": {"model": {"head": "tied"}},
    "softcap-over-tied": {"model": {"head": {"kind": "softcap", "cap": 5.0, "head": "tied"}}},
    "learned-positions": {"model": {"embedding": {"kind": "learned", "length": LENGTH}}},
    "mlp-all-biases": {"mixer": GQA | {"bias": "all"}, "ffn": {"kind": "mlp", "inner": 24, "bias": True}},
    "qk-norm": {"mixer": GQA | {"qk_norm": "rmsnorm"}},
    "two-blocks": OPTIONS["two-blocks"],
    "experts": {"ffn": MOE | {"inner": 25, "shared": GLU}},  # 25: torch does not count its grouped kernel
}


def model(case: str, device: str = "cpu") -> nn.Module:
    return made(device, **CASES[case])


def made(device: str = "cpu", **changes: Any) -> nn.Module:
    recipe = tiny(**{**changes, "model": changes.get("model", {}) | {"core": "eager"}})
    made = build(recipe.model, recipe.objective.build())
    if device == "cpu":
        made.to_empty(device="cpu")
        fill(made, 1)
    return made


def grouped(x: torch.Size, y: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOP of rows [n, d] by weights [e, d, f], or of the sums of products of rows [n, d] and [n, f]."""
    return 2 * x[0] * x[1] * y[-1]


OURS = {getattr(torch.ops.shardforge, name): grouped for name in ("grouped_mm", "grouped_mm_onto", "grouped_outer")}
"""Operations of nn.grouped, which torch does not know how to count."""


def counted(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=OURS) as counter:
        run()
    return counter.get_total_flops()


def inputs() -> tuple[torch.Tensor, Sequence]:
    positions = torch.arange(LENGTH)[None]
    tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens, Sequence(positions, torch.zeros_like(positions), torch.zeros(1, dtype=torch.int64))


def all_flops(made: nn.Module) -> float:
    """Of a forward pass without a mask, routers included."""
    return flops.forward_flops(made, LENGTH, masked=False) + 2 * flops.router_weights(made) * LENGTH


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_flops_are_those_that_torch_counts_but_for_routers(case):
    made = model(case)
    assert all_flops(made) == counted(lambda: made(*inputs()))


@pytest.mark.parametrize("case", CASES)
def test_backward_is_twice_the_forward(case):
    made, (tokens, seq) = model(case), inputs()
    logits = made(tokens, seq)
    assert counted(lambda: logits.sum().backward()) == 2 * all_flops(made)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_counted_as_torch_counts_them(case):
    made = model(case)
    assert flops.weights(made) == sum(weight.numel() for weight in made.parameters())


def test_a_model_without_storage_has_the_same_numbers():
    there, here = model("tied", "meta"), model("tied")
    assert flops.weights(there) == flops.weights(here)
    assert flops.step_flops(there, LENGTH) == flops.step_flops(here, LENGTH)


def test_a_mask_leaves_the_pairs_that_it_shows():
    made = model("plain")
    hidden_pairs = LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2
    saved = flops.forward_flops(made, LENGTH, masked=False) - flops.forward_flops(made, LENGTH)
    assert saved == 2 * 4 * hidden_pairs * GQA["heads"] * GQA["head_dim"]


def test_a_step_is_three_forward_passes():
    made = model("plain")
    assert flops.step_flops(made, LENGTH) == 3 * flops.forward_flops(made, LENGTH)


def test_a_tied_head_costs_flops_but_no_weights():
    tied, own = model("tied"), model("plain")
    assert flops.forward_flops(tied, LENGTH) == flops.forward_flops(own, LENGTH)
    assert flops.weights(own) - flops.weights(tied) == own.head.weight.numel()


def test_lookups_norms_and_biases_are_no_matmul_weights():
    made = model("mlp-all-biases")
    linears = {name for name, _ in made.named_parameters() if name.endswith("weight") and "norm" not in name}
    expected = sum(made.get_parameter(name).numel() for name in linears - {"embed.weight"})
    assert flops.matmul_weights(made) == expected
    assert GLU["inner"] == 24


def test_experts_that_a_token_does_not_meet_cost_weights_but_no_flops():
    few, many = (made(ffn=MOE | {"experts": experts}) for experts in (4, 8))
    added = 2 * 4 * (3 * 16 * 24 + 16)  # layers, experts, their weights and their rows of the router
    assert flops.weights(many) - flops.weights(few) == added
    assert flops.matmul_weights(many) == flops.matmul_weights(few)
    assert flops.router_weights(many) - flops.router_weights(few) == 2 * 4 * 16


def test_what_predicts_further_tokens_is_no_part_of_the_work():
    plain, ahead = made("meta"), made("meta", model={"mtp": {"block": "one"}})
    assert flops.weights(ahead) > flops.weights(plain)
    assert flops.step_flops(ahead, LENGTH) == flops.step_flops(plain, LENGTH)


def test_alone_what_predicts_further_tokens_has_its_own_work():
    ahead = made("meta", model={"mtp": {"block": "one"}})
    block = flops.forward_flops(ahead.mtp.get_submodule("0.block"), LENGTH)
    assert block == flops.forward_flops(ahead.blocks["0"], LENGTH)
    assert flops.forward_flops(ahead.mtp, LENGTH) == block + 2.0 * 2 * 16 * 16 * LENGTH
