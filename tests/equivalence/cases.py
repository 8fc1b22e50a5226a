"""What a rank of the pool runs: two optimizer steps of a tiny recipe, and everything that must be equal after them."""

from __future__ import annotations

import warnings
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardforge.core.layout import Layout
from shardforge.engine.base import Losses
from shardforge.model.ffns.glu import GLU
from shardforge.nn.record import charge
from shardforge.nn.sequence import Sequence
from tests.tiny import RTOL, assert_same, batch, part, tiny


def two_steps(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, gradients, clip norm of two steps, how experts were used, and the weights and what modules remember after
    each step, by name; on rank 0, of all stages."""
    recipe = tiny(layout=layout, **changes)
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    out: dict[str, Tensor] = {}
    for step in range(2):
        mine = part(batch(step), engine.mesh.data_rank, layout.data_ranks)
        losses = engine.forward_backward(mine, step)
        out[f"{step} loss"] = torch.tensor([losses.loss, *losses.terms.values()], dtype=torch.float64)
        out |= tallies(step, losses)
        out |= {f"{step} grad {name}": grad for name, grad in engine.gradients().items()}
        out[f"{step} norm"] = torch.tensor(engine.update(0.01).grad_norm, dtype=torch.float64)
        out |= {f"{step} weight {name}": whole(weight) for name, weight in engine.model.named_parameters()}
        out |= {f"{step} remembered {name}": buffer for name, buffer in engine.model.named_buffers()}
        out = {name: value.clone() for name, value in out.items()}
    held = engine.evaluate(part(batch(9), engine.mesh.data_rank, layout.data_ranks))
    out["held-out loss"] = torch.tensor(held.loss, dtype=torch.float64)
    return together(out)


def tallies(step: int, losses: Losses) -> dict[str, Tensor]:
    """Whole numbers as such, so that they must be the same."""
    out = {}
    for layer, tally in losses.experts.items():
        out[f"{step} load {layer}"] = torch.tensor([*tally.load, tally.tokens, tally.dropped]).long()
        out[f"{step} bias {layer}"] = torch.tensor(tally.bias or (0.0, 0.0))
        out[f"{step} entropy {layer}"] = torch.tensor(tally.entropy, dtype=torch.float64)
    return out


def compare(ranks, expected: dict[str, Tensor], layout: str, changes: dict[str, Any]) -> None:
    """two_steps on the layout that prints as `layout` is what `expected` says; called in the test's process."""
    wanted = Layout.parse(layout)
    assert_same(ranks(wanted.world_size).run(two_steps, wanted, changes)[0], expected)


def together(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks have, on rank 0; nothing on the others. What two ranks have must be the same."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    out: dict[str, Tensor] = {}
    for theirs in everyone or ():
        for name, value in theirs.items():
            first = out.setdefault(name, value)
            torch.testing.assert_close(
                value, first, rtol=RTOL, atol=RTOL, msg=lambda told, name=name: f"{name}: {told}"
            )
    return out


def charged_two_steps(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The same with an auxiliary loss in every feed-forward layer, which is recorded too."""

    def forward(self: GLU, x: Tensor, seq: Sequence) -> Tensor:
        y = plain(self, x, seq)
        loss = 0.3 * y.square().sum() / seq.shares.tokens
        seq.record("aux", id(self), loss)
        return charge(y, loss)

    plain = GLU.forward
    with patch.multiple(GLU, forward=forward, records=("aux",), create=True):
        return two_steps(layout, changes)


def compiled_two_steps(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The same where torch's compiler runs; its own deprecation warnings are not ours to mend."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = two_steps(layout, changes)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    return out | {"graphs": torch.tensor(graphs)} if out else out


def kept_types(layout: Layout, changes: dict[str, Any]) -> set[torch.dtype]:
    """Types of the weights, gradients and moments that a rank keeps."""
    recipe = tiny(layout=layout, **changes)
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    engine.forward_backward(part(batch(0), engine.mesh.data_rank, layout.data_ranks), 0)
    kept = {weight.grad.dtype for weight in engine.model.parameters()}
    engine.update(0.01)
    return kept | {tensor.dtype for tensor in engine.state().values()}


def whole(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()
