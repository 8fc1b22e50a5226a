"""What the ranks of the pool run for test_traps.py: our engine with one mistake put back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.nn import collectives, init, module
from shardforge.nn.batch import IGNORE
from shardforge.nn.sequence import Sequence
from shardforge.parallel import fully_shard, mesh
from tests.equivalence import cases
from tests.equivalence.cases import two_steps
from tests.tiny import batch, tiny


@contextmanager
def replaced(name: str, old: Any, new: Any) -> Iterator[None]:
    """`old` replaced by `new` in every module of ours that has imported it by name."""
    holders = [m for key, m in sys.modules.items() if key.startswith("shardforge") and getattr(m, name, None) is old]
    patches = [patch.object(holder, name, new) for holder in holders]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def bare_reader(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Weights read with a bare to_local(): a whole weight's gradient is taken for complete."""

    def read(weight: Tensor, rows: slice | None = None) -> Tensor:
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        return weight if rows is None else weight[rows]

    with replaced("local", module.local, read), patch.object(cases, "together", dict):  # ranks will not agree
        return two_steps(layout, changes)


def unsettled(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Boundaries that hand out results of collectives which may still be on their way."""

    def gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        return functional.all_gather_tensor_autograd(x.contiguous(), dim, group)

    def scatter_sum(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        return functional.reduce_scatter_tensor_autograd(x.contiguous(), "sum", dim, group)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with patch.object(collectives, "gather", gather), patch.object(collectives, "scatter_sum", scatter_sum):
            return two_steps(layout, changes | {"engine": {"kind": "native", "compiled": True}})


class Stage(nn.Module):
    """Some blocks of a decoder as a pipeline stage; every stage is told where the tokens stand."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor, labels: Tensor) -> Tensor:
        rows = torch.zeros(len(positions), dtype=torch.int64)
        seq = Sequence(positions, documents, rows, dtype=torch.float64)
        if self.decoder.head is None:
            return self.decoder(x, seq)
        return self.decoder(x, seq, labels)["total"][None].expand(len(positions)) / len(positions)


def pipelined(schedule: str, zero: int) -> dict[str, float]:
    """Two pipeline ranks x two FSDP ranks under a schedule that splits the backward pass; the worst gradient error."""
    recipe = tiny(model={"stack": ["one x 4"]})
    data = batch(0)
    scored = int((data.labels != IGNORE).sum())
    alone = decoder(recipe)
    seq = Sequence(data.positions, data.documents, data.rows, dtype=torch.float64)
    loss = alone(data.tokens, seq, data.labels)["total"] / scored
    loss.backward()
    grads = {name: weight.grad for name, weight in alone.named_parameters()}

    here = mesh.build(Layout(pp=2, dp_shard=2), "cpu")
    pp, dp = here.coordinate("pp"), here.data_rank
    kind = getattr(pipelining.schedules, f"Schedule{schedule}")
    order = [[0, 3], [1, 2]] if schedule in ("ZBVZeroBubble", "DualPipeV") else [[0, 2], [1, 3]]
    stages = [stage(recipe, index, here, zero) for index in order[pp]]
    run = kind(stages, n_microbatches=4, loss_fn=lambda out, _: out.sum() / scored, scale_grads=False)
    mine = list(data.split(4))[dp]
    where = {"positions": mine.positions, "documents": mine.documents, "labels": mine.labels}
    last = any(item.is_last for item in stages)
    losses: list[Tensor] = []
    first = (mine.tokens,) if any(item.is_first for item in stages) else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.step(*first, target=mine.labels if last else None, losses=losses if last else None, **where)
    total = torch.stack(losses).sum().detach() if losses else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total)
    worst = torch.tensor(max(errors(stages, grads)), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"loss": total.item(), "error": worst.item()}


def errors(stages: list, expected: dict[str, Tensor]) -> Iterator[float]:
    for item in stages:
        for name, weight in item.submod.decoder.named_parameters():
            want = expected[name]
            got = weight.grad.full_tensor() if weight.grad is not None else torch.zeros_like(want)
            yield ((got - want).norm() / want.norm()).item()


def decoder(recipe) -> nn.Module:
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    model.to_empty(device="cpu")
    init.fill(model, recipe.seed)
    return model


def stage(recipe, index: int, here: mesh.Mesh, zero: int) -> pipelining.PipelineStage:
    """One of four stages, one block each, sharded over dp by our own pass."""
    model = decoder(recipe)
    for layer in list(model.blocks):
        if layer != str(index):
            del model.blocks[layer]
    if index > 0:
        model.embed = None
    if index < 3:
        model.norm = model.head = None
    held = Stage(model)
    fully_shard.apply(held, here, MixedPrecisionPolicy(), zero=zero)
    return pipelining.PipelineStage(held, index, 4, torch.device("cpu"), group=here.group("pp"))
