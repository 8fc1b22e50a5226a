"""Bytes of one rank of any layout, from its own part of a step on tensors without storage.

The rank's model, passes, pipeline stages and optimizer are those of the engine. What stands in for others: collectives
of torch's fake process group, which return at once with the right shapes; fake tensors of the CPU and the CPU's
operations; even shares for experts, as routers have no numbers to choose by (nn.grouped.listed); and one operation that
keeps what fused attention keeps (plan.fake). Blocks are not compiled. Left out: rounding and caches of the allocator,
buffers of the communication library, workspaces of kernels, and experts that get more than their share.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor

from shardforge.engine import passes, staged
from shardforge.engine.fit import check_fit
from shardforge.engine.forward import Forward
from shardforge.engine.kinds.native import NativeConfig
from shardforge.engine.notes import Notes
from shardforge.engine.staged import Staged
from shardforge.engine.whole import Whole
from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.nn.batch import Batch
from shardforge.nn.sequence import Sequence, Shares
from shardforge.parallel import context, fully_shard, mesh
from shardforge.parallel.stages import ORDERS, Stages
from shardforge.plan import fake
from shardforge.plan.livebytes import LiveBytes
from shardforge.precision.types import DTYPES
from shardforge.recipe.schema import Recipe

FUSED = ("auto", "flash", "flex")
"""Attention cores that keep no scores and no mask; fake.Keeps stands in for them."""


@dataclass(frozen=True)
class StageBytes:
    """One stage of a rank."""

    between: int  # gathered weights, and gradients that are not yet summed, between two micro-batches
    kept: int  # activations of one micro-batch between its forward and its backward pass
    halved: int  # the same between the two halves of a split backward pass, gradients of activations included
    working: int  # most that one micro-batch adds to `between`


@dataclass(frozen=True)
class RankBytes:
    """One rank of a layout."""

    rank: int
    held: tuple[int, ...]  # stages of the pipeline
    layers: int
    count: int  # numbers in the weights of its stages, over all their ranks
    weights: int  # bytes, as all that follows
    gradients: int  # as the optimizer reads them
    optimizer: int
    messages: int  # what a stage of a pipeline is receiving and sending at a time
    stages: tuple[StageBytes, ...]

    @property
    def between(self) -> int:
        return sum(stage.between for stage in self.stages)

    @property
    def one(self) -> int:
        """Peak of forward and backward of one micro-batch, above weights and optimizer."""
        return self.between + max(stage.working for stage in self.stages)

    def peak(self, held: float) -> float:
        """Of a whole step, where a schedule holds `held` bytes of activations at a time."""
        extra = max(max(0, stage.working - max(stage.kept, stage.halved)) for stage in self.stages)
        return self.weights + self.optimizer + self.messages + max(self.one, self.between + held + extra)


class Rank:
    """The part of a recipe's model that one rank has, in a fake world. `stages` replaces the recipe's own cut."""

    def __init__(self, recipe: Recipe, mode: FakeTensorMode, stages: Stages | None = None):
        self.recipe, self.mode, self.cfg = recipe, mode, planned(recipe.engine)
        self.layout, device = recipe.parallel, torch.device("cpu")
        self.mesh = mesh.build(self.layout, device.type)
        self.compute, self.master = DTYPES[recipe.precision.compute], DTYPES[recipe.precision.master]
        fused = recipe.model.core.kind in FUSED
        cfg = dataclasses.replace(recipe.model, core=fake.KeepsConfig()) if fused else recipe.model
        model = build(cfg, recipe.objective.build(), self.master)
        check_fit(model, self.layout)
        self.terms, self.ahead = model.terms, model.ahead
        self.notes = Notes.of(model)
        self.cut = stages or staged.cut(recipe, self.cfg, model)
        if self.cut is None:
            self.runner: Whole | Staged = Whole(model, self.cfg.zero)
        else:
            self.runner = Staged(model, self.cut, self.mesh, device, model.width, self.compute)
        self.model: Decoder = self.runner.model
        for part in self.runner.parts:
            fake.give_storage(part, mode)
            passes.apply(part, self.mesh, self._mixed(), self.cfg)

    def _mixed(self) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(
            param_dtype=None if self.compute == self.master else self.compute,
            reduce_dtype=DTYPES[self.recipe.precision.reduce],
            cast_forward_inputs=False,
        )

    def forward(self) -> Forward:
        """Micro-batches of zeros."""
        train, layout = self.recipe.train, self.layout
        rows = train.micro_batch or max(1, train.sequences // layout.data_ranks)
        index = context.zigzag(train.seq_len, layout.cp, self.mesh.coordinate("cp"))
        zeros = torch.zeros(rows, train.seq_len // layout.cp, dtype=torch.int64)
        piece = Batch(zeros, zeros, zeros, zeros, zeros[:, 0]).look_ahead(self.ahead)
        shares = Shares(train.sequences * train.seq_len, train.sequences)
        tables = torch.promote_types(self.compute, torch.float32)

        def place(piece: Batch) -> Sequence:
            where = piece.positions, piece.documents, piece.rows
            options = {"index": index, "length": train.seq_len, "shares": shares, "ahead": piece.ahead}
            return Sequence(*where, None, tables, **options)

        return Forward([piece], place, self.terms, self.notes, 1)

    def stages(self) -> tuple[StageBytes, ...]:
        """Run each stage of the rank."""
        with self.mode, LiveBytes() as live:
            forward = self.forward()
            return tuple(self._stage(part, forward, live) for part in self.runner.parts)

    def bytes(self, rank: int) -> RankBytes:
        """Two micro-batches of each stage, the second the last of a step, and the optimizer."""
        weights = [_piece(weight) for weight in self.model.parameters()]
        with self.mode:
            optimizer = self.recipe.optim.build(self.model)
            with LiveBytes() as live:
                for weight in weights:
                    live.add(weight)
                forward = self.forward()
                stages = [self._stage(part, forward, live) for part in self.runner.parts]
            gradients = [_piece(weight.grad) for weight in self.model.parameters() if weight.grad is not None]
            optimizer.step()
        states = [_piece(x) for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return RankBytes(
            rank,
            (0,) if self.cut is None else self.cut.held(self.mesh.coordinate("pp")),
            len(self.model.blocks),
            sum(weight.numel() for weight in self.model.parameters()),
            _bytes(weights),
            _bytes(gradients),
            _bytes(states),
            0 if self.cut is None else 2 * _bytes([self._stream(forward)]),
            tuple(stages),
        )

    def _stage(self, part: Decoder, forward: Forward, live: LiveBytes) -> StageBytes:
        """forward, forward, backward, backward: one micro-batch keeps what the second forward pass added."""
        order = None if self.cut is None else ORDERS[self.cut.schedule]
        zero = 1 if order else self.cfg.zero  # torch's schedules keep gradients whole until the last micro-batch
        start = live.settled()
        fully_shard.sync(part, zero, last=False)
        if order and order.stages > 1:
            for unit in fully_shard.units(part):
                unit.unshard()  # schedules of several stages gather each of them as a whole
        one = self._run(part, forward)
        live.peak = before = live.settled()
        two = self._run(part, forward)
        kept, working = live.settled() - before, live.peak - before
        one.backward()
        del one
        between = live.settled() - kept - start
        live.peak, halved = live.now, kept
        if order and order.split:
            two.half()
            halved = live.settled() - between - start
            two.other_half()
            two = self._run(part, forward)
        fully_shard.sync(part, zero, last=True)
        two.backward()
        return StageBytes(between, kept, halved, max(working, live.peak - start - between))

    def _run(self, part: Decoder, forward: Forward) -> Pass:
        x = None if part.embed is not None else self._stream(forward)
        return Pass(part, x, forward(part, x, 0))

    def _stream(self, forward: Forward) -> Tensor:
        """What one stage hands to the next."""
        rows, tokens = forward.pieces[0].tokens.shape
        shape = rows, tokens // self.layout.tp, self.model.width
        return torch.zeros(shape, dtype=self.compute, requires_grad=True)


@dataclass
class Pass:
    """One forward pass of a part, and its backward pass whole or in torch's two halves."""

    part: Decoder
    x: Tensor | None  # None: it begins with tokens, and its backward pass is not split
    out: Tensor
    groups: list[Any] | None = None

    def backward(self) -> None:
        torch.autograd.backward(self.out, torch.ones_like(self.out))

    def half(self) -> None:
        if self.x is not None:
            grad, weights = torch.ones_like(self.out), self.part.parameters()
            _, self.groups = stage_backward_input([self.out], [grad], [self.x], weights)

    def other_half(self) -> None:
        if self.groups is None:
            self.backward()
        else:
            stage_backward_weight(self.part.parameters(), self.groups)


def _piece(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def planned(cfg: NativeConfig) -> NativeConfig:
    """The engine's options without what needs a GPU or numbers: what is offloaded counts as if it stayed."""
    dispatch = "exchange" if cfg.dispatch == "deepep" else cfg.dispatch
    offload = tuple(part for part in cfg.offload if part != "activations")
    return dataclasses.replace(cfg, compiled=False, dispatch=dispatch, offload=offload)
