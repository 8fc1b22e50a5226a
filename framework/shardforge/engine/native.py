"""Build, passes, forward_backward, update: the one place where a model meets a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from shardforge.checkpoint import state
from shardforge.engine import passes
from shardforge.engine.base import Losses, UpdateStats
from shardforge.engine.fit import check_fit
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.nn import counter
from shardforge.nn.batch import IGNORE, Batch
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.optim.clip import clip, global_norm
from shardforge.parallel import fully_shard, mesh
from shardforge.precision.types import DTYPES
from shardforge.recipe.schema import Recipe

if TYPE_CHECKING:
    from shardforge.engine.kinds.native import NativeConfig


class NativeEngine:
    """See engine.base.Engine. Needs torch.distributed initialised, also for one process."""

    def __init__(self, recipe: Recipe, cfg: NativeConfig, device: torch.device):
        self.recipe, self.device = recipe, device
        self.mesh = mesh.build(recipe.parallel, device.type)
        self.master = DTYPES[recipe.precision.master]
        self.model = build(recipe.model, recipe.objective.build(), self.master)
        check_fit(self.model, recipe.parallel)
        self.weights = flops.weights(self.model)
        self.step_flops = flops.step_flops(self.model, recipe.train.seq_len)
        passes.apply(
            self.model,
            self.mesh,
            self.mixed(),
            recomputed=cfg.recompute,
            compiled=cfg.compiled,
            resharded=cfg.resharded,
        )
        self.model.to_empty(device=device)
        fill(self.model, recipe.seed)
        self.optimizer = recipe.optim.build(self.model)

    def mixed(self) -> MixedPrecisionPolicy:
        compute = DTYPES[self.recipe.precision.compute]
        return MixedPrecisionPolicy(
            param_dtype=None if compute == self.master else compute,
            reduce_dtype=DTYPES[self.recipe.precision.reduce],
            cast_forward_inputs=False,  # it would reach into Sequence and round the position tables
        )

    def forward_backward(self, batch: Batch, step: int) -> Losses:
        batch = batch.to(self.device)
        scored = self.total((batch.labels != IGNORE).sum()[None]).item()
        key = torch.tensor(counter.key(self.recipe.seed, "dropout", step), device=self.device)
        pieces = list(batch.split(self.recipe.train.micro_batch or len(batch)))
        sums: dict[str, Tensor] = {}
        for index, piece in enumerate(pieces):
            self.sync(last=index == len(pieces) - 1)
            out = self.forward(piece, key)
            (out["total"] / max(1, scored)).backward()
            sums = add(sums, out)
        return self.losses(sums, scored)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        batch = batch.to(self.device)
        scored = self.total((batch.labels != IGNORE).sum()[None]).item()
        sums: dict[str, Tensor] = {}
        for piece in batch.split(self.recipe.train.micro_batch or len(batch)):
            sums = add(sums, self.forward(piece, None))
        return self.losses(sums, scored)

    def update(self, lr: float) -> UpdateStats:
        parameters = list(self.model.parameters())
        norm = global_norm(parameters)
        if self.recipe.optim.clip is not None:
            clip(parameters, norm, self.recipe.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateStats(norm.item())

    def state(self) -> dict[str, Tensor]:
        return state.collect(self.model, self.optimizer)

    def load(self, read: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = self.state()
        read(tensors)
        state.restore(self.model, self.optimizer, tensors)

    def describe(self) -> dict[str, object]:
        return {"model": state.table(self.model)}

    def forward(self, piece: Batch, key: Tensor | None) -> dict[str, Tensor]:
        tables = torch.promote_types(DTYPES[self.recipe.precision.compute], torch.float32)
        seq = Sequence(piece.positions, piece.documents, piece.rows, key, tables)
        return self.model(piece.tokens, seq, piece.labels)

    def sync(self, *, last: bool) -> None:
        """Sum gradients over replicas once a step; over shards after each micro-batch, so only shards are kept."""
        if isinstance(self.model, FSDPModule):
            for unit in fully_shard.units(self.model):
                unit.set_requires_all_reduce(last)
            self.model.set_is_last_backward(last)

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks that read different sequences."""
        if self.mesh.layout.data_ranks > 1:
            dist.all_reduce(x, group=self.mesh.data)
        return x

    def losses(self, sums: dict[str, Tensor], scored: int) -> Losses:
        names = sorted(name for name in sums if name != "total")
        values = self.total(torch.stack([sums[name].double() for name in names])) / max(1, scored)
        terms = dict(zip(names, values.tolist(), strict=True))
        return Losses(terms.pop("loss"), terms, scored)

    def gradients(self) -> dict[str, Tensor]:
        """Every whole gradient by name; for tests and `verify`, not for training."""
        grads = {name: weight.grad for name, weight in self.model.named_parameters()}
        return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()}


def add(sums: dict[str, Tensor], out: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sums.get(name, 0) + value.detach() for name, value in out.items()}
