"""Build, passes, forward_backward, update: the one place where a model meets a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from shardforge.checkpoint import state
from shardforge.core.layout import AXES
from shardforge.core.log import logger
from shardforge.engine import notes, passes, similarity, staged
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
        self.notes = notes.Notes.of(model)
        self.terms, self.ahead = model.terms, model.ahead
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
        self.done = 0  # steps
        self.loads: Mapping[int, Tensor] | None = None  # by layer, of a step between its gradients and its update

    def mixed(self) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(
            param_dtype=None if self.compute == self.master else self.compute,
            reduce_dtype=DTYPES[self.recipe.precision.reduce],
            cast_forward_inputs=False,  # it would reach into Sequence and round the position tables
        )

    def forward_backward(self, batch: Batch, step: int) -> Losses:
        self.done = step
        key = torch.tensor(counter.key(self.recipe.seed, "dropout", step), device=self.device)
        forward = self.forward(batch, key)
        if self.notes.counting:
            self.runner.count(forward)
            forward.begin(self.counted(forward))
        self.runner.train(forward)
        found = self.losses(forward)
        self.loads = {layer: self.wide(tally.load) for layer, tally in found.experts.items()}
        return found

    def evaluate(self, batch: Batch) -> Losses:
        forward = self.forward(batch, None)
        self.runner.evaluate(forward)
        found = self.losses(forward)
        return replace(found, terms={name: found.terms[name] for name in self.terms if name in found.terms})

    def similarity(self) -> dict[int, float]:
        layout = self.mesh.layout
        stage = layout.world_size // layout.pp
        return similarity.measured(self.model, self.notes.tallies, stage, self.summed, self.device)

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
        self.done += 1
        self.settle()
        return UpdateStats(norm.item())

    @torch.no_grad()
    def settle(self) -> None:
        """Every module that remembers something of a step learns what the whole batch of it came to."""
        if self.loads is None:
            return
        for module in self.model.modules():
            if settle := getattr(module, "settle", None):
                settle(self.loads, self.progress)
        self.loads = None

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done."""
        return self.done / self.recipe.train.steps

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
        batch = batch.look_ahead(self.ahead)  # while rows are whole: another rank may hold the token ahead
        rows = [(each.documents != PADDING).any(1).sum() for each in (batch, *batch.ahead)]
        batch = (batch.at(index) if layout.cp > 1 else batch).to(self.device)
        index = index.to(self.device)
        real = [(each.documents != PADDING).sum() for each in (batch, *batch.ahead)]
        counts = torch.stack([(batch.labels != IGNORE).sum(), *real, *(each.to(self.device) for each in rows)])
        scored, *sizes = self.total(counts, self.mesh.data).tolist()
        here, *further = (
            Shares(t, r // layout.cp) for t, r in zip(sizes[: len(real)], sizes[len(real) :], strict=True)
        )
        shares = replace(here, ahead=tuple(further))
        tables = torch.promote_types(self.compute, torch.float32)

        def place(piece: Batch) -> Sequence:
            where = piece.positions, piece.documents, piece.rows
            options = {"index": index, "length": length, "shares": shares, "progress": self.progress}
            return Sequence(*where, key, tables, ahead=piece.ahead, **options)

        pieces = list(batch.split(self.recipe.train.micro_batch or len(batch)))
        return Forward(pieces, place, self.terms, self.notes, scored)

    def total(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x

    def losses(self, forward: Forward) -> Losses:
        """Terms of the objective are the same on all ranks of a tp group; records and tallies a part on every rank, for
        between slots each has tokens of its own. The biases of a stage are the same on all its ranks."""
        names, scored = list(forward.sums), forward.scored
        values = torch.stack([value.double() for value in forward.sums.values()])
        recorded = torch.tensor([name in self.notes.records for name in names])
        if self.mesh.coordinate("tp") > 0:
            values = values * recorded.to(self.device)
        ranges = notes.ranges(self.notes, self.model, self.device)
        if any(self.mesh.coordinate(axis) for axis in AXES if axis != "pp"):
            ranges = torch.zeros_like(ranges)
        values, ranges, *tallies = self.summed([values, ranges, *forward.tallies.values()], torch.device("cpu"))
        terms = dict(zip(names, (values / torch.where(recorded, 1, max(1, scored))).tolist(), strict=True))
        experts = notes.experts(self.notes, dict(zip(forward.tallies, tallies, strict=True)), ranges)
        return Losses(terms.pop("loss"), terms, scored, dict(experts))

    def counted(self, forward: Forward) -> dict[int, Tensor]:
        """The tally "load" of each layer over all ranks."""
        mine = notes.loads(forward.tallies)
        return dict(zip(mine, self.summed(list(mine.values()), self.device), strict=True))

    def summed(self, vectors: list[Tensor], device: torch.device) -> list[Tensor]:
        """Over all ranks, in one collective and one copy to `device`."""
        flat = self.total(torch.cat(vectors), dist.group.WORLD).to(device)
        return list(flat.split([len(vector) for vector in vectors]))

    def wide(self, numbers: tuple[float, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self.device)

    def gradients(self) -> dict[str, Tensor]:
        """Every whole gradient of this rank's stages by name, of weights that have one; for tests and `verify`."""
        grads = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()}
