"""Build, passes, forward_backward, update: the one place where a model meets a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from shardforge.checkpoint import state
from shardforge.core.log import logger
from shardforge.engine import passes, staged
from shardforge.engine.base import Losses, UpdateStats
from shardforge.engine.fit import check_fit
from shardforge.engine.forward import Forward
from shardforge.engine.staged import Staged
from shardforge.engine.whole import Whole
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.nn import counter
from shardforge.nn.batch import IGNORE, PADDING, Batch
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence, Shares
from shardforge.optim.clip import clip, global_norm
from shardforge.parallel import context, mesh, offload
from shardforge.precision.types import DTYPES
from shardforge.recipe.schema import Recipe

if TYPE_CHECKING:
    from shardforge.engine.kinds.native import NativeConfig

log = logger("engine")


class NativeEngine:
    """See engine.base.Engine. Needs torch.distributed initialised, also for one process."""

    def __init__(self, recipe: Recipe, cfg: NativeConfig, device: torch.device):
        self.recipe, self.cfg, self.device = recipe, cfg, device
        self.mesh = mesh.build(recipe.parallel, device.type)
        self.master = DTYPES[recipe.precision.master]
        self.compute = DTYPES[recipe.precision.compute]
        model = build(recipe.model, recipe.objective.build(), self.master)
        check_fit(model, recipe.parallel)
        context.tell(model, recipe.parallel, cfg.context, recipe.train.seq_len)
        self.stages = staged.cut(recipe, cfg, model)
        self.weights = flops.weights(model)
        self.step_flops = flops.step_flops(model, recipe.train.seq_len)
        self.records = sorted({name for module in model.modules() for name in getattr(module, "records", ())})
        self.terms = model.objective.terms
        self.table = state.table(model)
        if self.stages is None:
            self.runner: Whole | Staged = Whole(model, cfg.zero)
        else:
            log.info("%s over %d ranks\n%s", cfg.schedule, recipe.parallel.pp, self.stages.table())
            self.runner = Staged(model, self.stages, self.mesh, device, model.width, self.compute)
        self.model = self.runner.model  # of a pipeline, the modules of this rank's stages
        for part in self.runner.parts:
            passes.apply(part, self.mesh, self.mixed(), cfg)
            offload.materialise(part, device, cfg.offload)
        fill(self.model, recipe.seed)
        self.runner.renew()
        self.optimizer = recipe.optim.build(self.model)

    def mixed(self) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(
            param_dtype=None if self.compute == self.master else self.compute,
            reduce_dtype=DTYPES[self.recipe.precision.reduce],
            cast_forward_inputs=False,  # it would reach into Sequence and round the position tables
        )

    def forward_backward(self, batch: Batch, step: int) -> Losses:
        key = torch.tensor(counter.key(self.recipe.seed, "dropout", step), device=self.device)
        forward = self.forward(batch, key)
        self.runner.train(forward)
        return self.losses(forward)

    def evaluate(self, batch: Batch) -> Losses:
        forward = self.forward(batch, None)
        self.runner.evaluate(forward)
        return self.losses(forward)

    def update(self, lr: float) -> UpdateStats:
        parameters = list(self.model.parameters())
        norm = global_norm(parameters)
        if self.recipe.optim.clip is not None:
            clip(parameters, norm, self.recipe.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.runner.renew()
        return UpdateStats(norm.item())

    def state(self) -> dict[str, Tensor]:
        return state.collect(self.model, self.optimizer)

    def load(self, read: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = self.state()
        read(tensors)
        state.restore(self.model, self.optimizer, tensors)
        self.runner.renew()

    def describe(self) -> dict[str, object]:
        return {"model": self.table}

    def forward(self, batch: Batch, key: Tensor | None) -> Forward:
        """The forward passes over this rank's columns of its rows of a batch."""
        layout = self.mesh.layout
        index = context.zigzag(batch.tokens.shape[1], layout.cp, self.mesh.coordinate("cp"))
        length = batch.tokens.shape[1]
        batch = (batch.at(index) if layout.cp > 1 else batch).to(self.device)
        index = index.to(self.device)
        counts = torch.stack([(batch.labels != IGNORE).sum(), (batch.documents != PADDING).sum()])
        scored, tokens = self.total(counts, self.mesh.data).tolist()
        shares = Shares(tokens, len(batch) * layout.data_ranks)
        tables = torch.promote_types(self.compute, torch.float32)

        def place(piece: Batch) -> Sequence:
            where = piece.positions, piece.documents, piece.rows
            return Sequence(*where, key, tables, index=index, length=length, shares=shares)

        pieces = list(batch.split(self.recipe.train.micro_batch or len(batch)))
        return Forward(pieces, place, self.terms, self.records, scored)

    def total(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x

    def losses(self, forward: Forward) -> Losses:
        """Terms of the objective are the same on all ranks of a tp group, records a part on every rank."""
        names, scored = list(forward.sums), forward.scored
        values = torch.stack([value.double() for value in forward.sums.values()])
        recorded = torch.tensor([name in self.records for name in names], device=self.device)
        if self.mesh.coordinate("tp") > 0:
            values = values * recorded
        values = self.total(values, dist.group.WORLD) / torch.where(recorded, 1, max(1, scored))
        terms = dict(zip(names, values.tolist(), strict=True))
        return Losses(terms.pop("loss"), terms, scored)

    def gradients(self) -> dict[str, Tensor]:
        """Every whole gradient of this rank's stages by name, of weights that have one; for tests and `verify`."""
        grads = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()}
