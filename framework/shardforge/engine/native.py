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
from shardforge.nn.batch import IGNORE, PADDING, Batch
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence, Shares
from shardforge.optim.clip import clip, global_norm
from shardforge.parallel import context, fully_shard, mesh
from shardforge.precision.types import DTYPES
from shardforge.recipe.schema import Recipe

if TYPE_CHECKING:
    from shardforge.engine.kinds.native import NativeConfig


class NativeEngine:
    """See engine.base.Engine. Needs torch.distributed initialised, also for one process."""

    def __init__(self, recipe: Recipe, cfg: NativeConfig, device: torch.device):
        self.recipe, self.cfg, self.device = recipe, cfg, device
        self.mesh = mesh.build(recipe.parallel, device.type)
        self.master = DTYPES[recipe.precision.master]
        self.model = build(recipe.model, recipe.objective.build(), self.master)
        check_fit(self.model, recipe.parallel)
        self.weights = flops.weights(self.model)
        self.records = sorted({name for module in self.model.modules() for name in getattr(module, "records", ())})
        self.step_flops = flops.step_flops(self.model, recipe.train.seq_len)
        passes.apply(self.model, self.mesh, self.mixed(), cfg)
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
        batch, shares, scored = self.mine(batch)
        key = torch.tensor(counter.key(self.recipe.seed, "dropout", step), device=self.device)
        pieces = list(batch.split(self.recipe.train.micro_batch or len(batch)))
        sums: dict[str, Tensor] = {}
        for index, piece in enumerate(pieces):
            self.sync(last=index == len(pieces) - 1)
            out = self.forward(piece, key, shares)
            (out["total"] / max(1, scored)).backward()
            sums = add(sums, out)
        return self.losses(sums, scored)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        batch, shares, scored = self.mine(batch)
        sums: dict[str, Tensor] = {}
        for piece in batch.split(self.recipe.train.micro_batch or len(batch)):
            sums = add(sums, self.forward(piece, None, shares))
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

    def mine(self, batch: Batch) -> tuple[Batch, Shares, int]:
        """This rank's columns of its rows; the size of the whole batch; labels in it."""
        layout = self.mesh.layout
        index = context.zigzag(batch.tokens.shape[1], layout.cp, self.mesh.coordinate("cp"))
        batch = (batch.at(index) if layout.cp > 1 else batch).to(self.device)
        counts = torch.stack([(batch.labels != IGNORE).sum(), (batch.documents != PADDING).sum()])
        scored, tokens = self.total(counts, self.mesh.data).tolist()
        return batch, Shares(tokens, len(batch) * layout.data_ranks), scored

    def forward(self, piece: Batch, key: Tensor | None, shares: Shares) -> dict[str, Tensor]:
        layout, length = self.mesh.layout, piece.tokens.shape[1] * self.mesh.layout.cp
        seq = Sequence(
            piece.positions,
            piece.documents,
            piece.rows,
            key,
            torch.promote_types(DTYPES[self.recipe.precision.compute], torch.float32),
            index=context.zigzag(length, layout.cp, self.mesh.coordinate("cp")).to(self.device),
            length=length,
            shares=shares,
        )
        sums = self.model(piece.tokens, seq, piece.labels)
        return {**sums, **self.noted(seq)}

    def noted(self, seq: Sequence) -> dict[str, Tensor]:
        """What blocks recorded, added over layers; every name that any block of the whole model may record."""
        notes = dict.fromkeys(self.records, torch.zeros((), dtype=torch.float64, device=self.device))
        for (name, _), value in seq.records.items():
            notes[name] = notes[name] + value
        return notes

    def sync(self, *, last: bool) -> None:
        """Sum gradients over replicas once a step; over shards after each micro-batch, so only shards are kept."""
        if isinstance(self.model, FSDPModule):
            for unit in fully_shard.units(self.model):
                unit.set_requires_all_reduce(last)
            self.model.set_is_last_backward(last)

    def total(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x

    def losses(self, sums: dict[str, Tensor], scored: int) -> Losses:
        """Sums of the objective are the same on all ranks of a tp group, notes of blocks are a part on every rank."""
        names = sorted(name for name in sums if name != "total")
        values = torch.stack([sums[name].double() for name in names])
        noted = torch.tensor([name in self.records for name in names], device=self.device)
        if self.mesh.coordinate("tp") > 0:
            values = values * noted
        values = self.total(values, dist.group.WORLD) / torch.where(noted, 1, max(1, scored))
        terms = dict(zip(names, values.tolist(), strict=True))
        return Losses(terms.pop("loss"), terms, scored)

    def gradients(self) -> dict[str, Tensor]:
        """Every whole gradient by name; for tests and `verify`, not for training."""
        grads = {name: weight.grad for name, weight in self.model.named_parameters()}
        return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()}


def add(sums: dict[str, Tensor], out: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sums.get(name, 0) + value.detach() for name, value in out.items()}
