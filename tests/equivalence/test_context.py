"""Law 4 over cp: every way of reaching other ranks' positions equals one process, in loss and every gradient."""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from shardforge.core import slots
from shardforge.core.errors import ForgeError
from shardforge.core.layout import Layout
from shardforge.engine.fit import check_recipe
from shardforge.nn import collectives
from shardforge.nn.batch import IGNORE, PADDING, Batch
from tests.equivalence import cases
from tests.equivalence.cases import whole
from tests.tiny import GLU, GQA, LENGTH, RTOL, SEQUENCES, assert_same, batch, part, tiny
from tests.tiny_kinds import kind

LAYOUTS = ["cp2", "cp4", "cp2-tp2", "dp2-cp2"]
PLAIN = ("auto", "ring", "ulysses")
WINDOWED = ("auto", "gather", "ring")
WIDE = GQA | {"heads": 8}
NEAR = {"mixer": WIDE | {"mask": {"kind": "window", "size": 3}}, "ffn": GLU}
FAR = {"mixer": WIDE | {"position": "nope"}, "ffn": GLU}
SINKS = {"sinks": "learned", "kv_heads": 2}
CAPPED = {"softcap": 0.7, "kv_heads": 2}
"""Scores of these models are about 1, so that this bends most of them."""
BENT = {"near": NEAR | {"mixer": NEAR["mixer"] | CAPPED}, "far": FAR | {"mixer": FAR["mixer"] | CAPPED}}
SUNK = {"near": NEAR | {"mixer": NEAR["mixer"] | SINKS}, "far": FAR | {"mixer": FAR["mixer"] | SINKS}}


def windowed(size: int) -> dict[str, Any]:
    return {"mixer": WIDE | {"mask": {"kind": "window", "size": size}}}


def engine(**changes: Any) -> dict[str, Any]:
    return {"engine": {"kind": "native", **changes}}


LATENTS = kind(slots.mixers, "mla") | {"evaluation": "absorbed", "qk_rope_head_dim": 4}
LATENTS["position"] = {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 4.0, "original_length": LENGTH // 2}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one-kv-head": ("packed", {"mixer": WIDE | {"kv_heads": 1}}),
    "mla": ("joined", {"mixer": kind(slots.mixers, "mla")}),
    "mla-absorbed": ("packed", {"mixer": LATENTS}),
    "causal": ("packed", {"mixer": WIDE}),
    "one-document": ("joined", {"mixer": WIDE | {"kv_heads": 8}}),
    "grouped-qk-norm": ("padded", {"mixer": WIDE | {"kv_heads": 2, "qk_norm": "rmsnorm", "bias": "all"}}),
    "window-within-a-chunk": ("joined", windowed(3)),
    "window-of-a-chunk": ("joined", windowed(5)),
    "window-over-chunks": ("padded", windowed(9)),
    "near-and-far": ("packed", {"model": {"blocks": {"near": NEAR, "far": FAR}, "stack": ["near x 2", "far"]}}),
    "sinks": ("padded", {"model": {"blocks": SUNK, "stack": ["near", "far"]}}),
    "softcap": ("padded", {"model": {"blocks": BENT, "stack": ["near", "far"]}}),
    "learned-positions": (
        "padded",
        {"mixer": WIDE | {"position": "nope"}, "model": {"embedding": {"kind": "learned", "length": LENGTH}}},
    ),
    "dropout-recomputed": (
        "packed",
        {"mixer": WIDE, "residual": {"kind": "pre", "dropout": 0.3}, "model": {"dropout": 0.2}},
    ),
    "eager-accumulated": ("padded", {"mixer": WIDE, "model": {"core": "eager"}}),
}
"""Name -> the data, and changes to the tiny recipe."""

SHARDED = {
    "dropout-recomputed": {"engine": {"recompute": "full"}},
    "eager-accumulated": {"engine": {"recompute": "selective"}, "train": {"micro_batch": 2}},
    "sinks": {"engine": {"recompute": "selective"}},
    "softcap": {"engine": {"recompute": "selective"}},
}
"""How the ranks compute a case; one process computes it plainly."""


def data(step: int, name: str) -> Batch:
    """Packed documents; the same with tails of padding and a row of nothing else; or one document a row."""
    given = batch(step)
    positions, documents, labels = given.positions.clone(), given.documents.clone(), given.labels.clone()
    natural = torch.arange(LENGTH)
    if name == "joined":
        positions[:], documents[:] = natural, 0
    if name == "padded":
        for row in range(SEQUENCES):
            end = LENGTH - 2 * row if row < SEQUENCES - 1 else 0
            documents[row, end:], labels[row, end:] = PADDING, IGNORE
            positions[row, end:] = natural[: LENGTH - end]
    return Batch(given.tokens, labels, positions, documents, given.rows)


def two_steps(layout: Layout, changes: dict[str, Any], name: str) -> dict[str, Tensor]:
    recipe = tiny(layout=layout, **changes)
    made = recipe.engine.build(recipe, torch.device("cpu"))
    out: dict[str, Tensor] = {}
    for step in range(2):
        losses = made.forward_backward(part(data(step, name), made.mesh.data_rank, layout.data_ranks), step)
        out[f"{step} loss"] = torch.tensor(losses.loss, dtype=torch.float64)
        out |= {f"{step} grad {fqn}": grad for fqn, grad in made.gradients().items()}
        out[f"{step} norm"] = torch.tensor(made.update(0.01).grad_norm, dtype=torch.float64)
    out |= {f"weight {fqn}": whole(weight) for fqn, weight in made.model.named_parameters()}
    held = made.evaluate(part(data(9, name), made.mesh.data_rank, layout.data_ranks))
    out["held-out loss"] = torch.tensor(held.loss, dtype=torch.float64)
    return out if dist.get_rank() == 0 else {}


def sharded(case: str, method: str) -> dict[str, Any]:
    _, changes = CASES[case]
    extra = SHARDED.get(case, {})
    train = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH} | extra.get("train", {})
    return changes | engine(context=method, **extra.get("engine", {})) | {"train": train}


def methods(case: str) -> tuple[str, ...]:
    """Those that differ: without a window auto is gather."""
    if case in ("near-and-far", "sinks", "softcap"):
        return ("gather", *PLAIN)
    return WINDOWED if case.startswith("window") else PLAIN


def sample() -> list[tuple[str, str, str]]:
    """(case, method, layout): layouts in turn, so that each of them meets every method and most cases."""
    pairs = [(case, method) for case in CASES for method in methods(case)]
    return [(*pair, LAYOUTS[i % len(LAYOUTS)]) for i, pair in enumerate(pairs)]


class Stays(Function):
    """A gather whose backward pass keeps this rank's piece of its own gradient and forgets the other ranks'."""

    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return collectives._gathered(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()].contiguous(), None, None


def forgetful(layout: Layout, changes: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Two steps in which no rank tells the others what their keys and values did to its loss."""
    with patch.object(collectives, "gather", Stays.apply):
        return two_steps(layout, changes, name)


@pytest.fixture(scope="module")
def alone(ranks):
    """case -> the two steps of one process, computed once."""
    return functools.cache(lambda case: ranks(1).run(two_steps, Layout(), CASES[case][1], CASES[case][0])[0])


@pytest.mark.parametrize(("case", "method", "layout"), sample())
def test_sharing_sequences_over_cp_changes_nothing(ranks, alone, case, method, layout):
    wanted = Layout.parse(layout)
    got = ranks(wanted.world_size).run(two_steps, wanted, sharded(case, method), CASES[case][0])[0]
    assert_same(got, alone(case))


def test_keys_that_hear_only_of_their_own_ranks_loss_give_the_right_loss_and_wrong_gradients(ranks, alone):
    got = ranks(2).run(forgetful, Layout(cp=2), sharded("causal", "gather"), "packed")[0]
    expected = alone("causal")
    assert abs(got["0 loss"] - expected["0 loss"]) < RTOL
    key = "0 grad blocks.0.mixer.k.weight"
    assert (got[key] - expected[key]).norm() > 0.1 * expected[key].norm()


def test_a_recipe_whose_heads_cannot_be_traded_is_refused_before_the_run():
    recipe = tiny(layout=Layout(cp=4), mixer=GQA | {"heads": 6, "kv_heads": 2}, **engine(context="ulysses"))
    with pytest.raises(ForgeError, match=r"6 query heads on each tp rank cannot be traded 4 ways(.|\n)*parallel.cp: 2"):
        check_recipe(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("method", PLAIN)
def test_compiled_blocks_share_sequences_as_eager_ones_do(ranks, method):
    changes = CASES["sinks"][1]
    expected = ranks(1).run(cases.two_steps, Layout(), changes)[0]
    got = ranks(2).run(cases.compiled_two_steps, Layout(cp=2), changes | engine(context=method, compiled=True))[0]
    got.pop("graphs")
    assert_same(got, expected)
