"""Mistakes that `verify` must find: each function puts one back, for good, in the process that calls it.

`verify` calls them by name in the ranks of a layout, never in the one process that these are compared with.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardforge.checkpoint import state
from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.engine import native
from shardforge.engine.forward import Forward
from shardforge.model import experts
from shardforge.model.ffns import moe
from shardforge.model.routing import Routing
from shardforge.nn import collectives, linear, module, overlap, record
from shardforge.nn.batch import IGNORE
from shardforge.nn.head import VocabSplit
from shardforge.optim import clip
from shardforge.parallel import fully_shard, twins


@dataclass(frozen=True, kw_only=True)
class ByShard:
    """An optimizer whose step has the length of one in every piece of a weight, whatever the layout."""

    clip: float | None = None

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return ShardDescent(model.parameters(), {"lr": 0.0})


class ShardDescent(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    piece, grad = (x.to_local() if isinstance(x, DTensor) else x for x in (weight, weight.grad))
                    piece.add_(grad / (grad.norm() + 1e-6), alpha=-group["lr"])


def everywhere(name: str, old: Any, new: Any) -> None:
    """Replace `old` by `new` in every module of ours that has imported it by name."""
    for key, holder in list(sys.modules.items()):
        if key.startswith("shardforge") and getattr(holder, name, None) is old:
            setattr(holder, name, new)


def own_mean() -> None:
    """Each rank divides by its own labels, and ranks are averaged."""

    def forward(engine: native.NativeEngine, batch: Any, key: Tensor | None) -> Forward:
        out = right(engine, batch, key)
        own = sum(int((piece.labels != IGNORE).sum()) for piece in out.pieces)
        out.scored = max(1, own) * engine.mesh.data.size()
        return out

    def losses(engine: native.NativeEngine, out: Forward) -> Any:
        told = torch.tensor([out.sums["loss"].item() / out.scored, float(out.scored)], dtype=torch.float64)
        dist.all_reduce(told)
        sharing = dist.get_world_size() // engine.mesh.data.size()  # ranks that report the same numbers
        return native.Losses(told[0].item() / sharing, {}, round(told[1].item() / sharing / engine.mesh.data.size()))

    right = native.NativeEngine.forward
    native.NativeEngine.forward, native.NativeEngine.losses = forward, losses


def micro_batch_mean() -> None:
    """Each micro-batch is averaged over its own labels; only the gradient is wrong."""

    def call(self: Forward, part: Any, x: Tensor | None, micro: int) -> Tensor:
        own = (self.pieces[micro].labels != IGNORE).sum()
        dist.all_reduce(own)  # over the data ranks, which are all ranks here
        return right(self, part, x, micro) * self.scored / (max(1, own.item()) * len(self.pieces))

    right = Forward.__call__
    Forward.__call__ = call


def gathered_vocabulary() -> None:
    """The softmax counts every column once on each rank."""

    def total(self: VocabSplit, x: Tensor) -> Tensor:
        factor = 1 if self.group is None or (x <= 0).any() else self.group.size()  # only normalizers are all positive
        return right(self, x) * factor

    right = VocabSplit.total
    VocabSplit.total = total


def labels_over_tp() -> None:
    """Labels are counted over all ranks, also those that hold the same ones."""

    def total(engine: native.NativeEngine, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        dist.all_reduce(x)
        return x

    native.NativeEngine.total = total


def bare_reader() -> None:
    """Weights that are whole on each rank are read as if their gradient were whole too."""

    def read(weight: Tensor, rows: slice | None = None) -> Tensor:
        piece = weight.to_local() if isinstance(weight, DTensor) else weight
        return piece if rows is None else piece[rows]

    everywhere("local", module.local, read)


def bias_on_every_rank() -> None:
    def forward(self: linear.Linear, x: Tensor) -> Tensor:
        self.once = 1.0
        return right(self, x)

    right = linear.Linear.forward
    linear.Linear.forward = forward


def own_keys_only() -> None:
    """The gradient of gathered keys and values does not return to the ranks that sent them."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()].contiguous(), None, None

    collectives._Gather.backward = staticmethod(backward)


def experts_twice() -> None:
    """The gradient of an expert is summed once more over ep."""
    one, several = experts.grouped_linear, experts.grouped_linears

    def twice(weight: Tensor) -> Tensor:
        return weight + (weight - weight.detach())

    experts.grouped_linear = lambda x, weight, *rest: one(x, twice(weight), *rest)
    experts.grouped_linears = lambda x, weights, *rest: several(x, [twice(weight) for weight in weights], *rest)


def routers_of_own_experts() -> None:
    """A router learns only from the experts of its own rank."""

    def forward(self: moe.MoE, x: Tensor, seq: Any) -> Tensor:
        share = self.choices // dist.get_world_size()
        first = share * dist.get_rank()

        def routed(x: Tensor, seq: Any, split: Any) -> Routing:
            found = router(x, seq, split)
            own = (found.expert >= first) & (found.expert < first + share)
            return Routing(found.expert, found.weight.where(own, found.weight.detach()), found.shares, found.logits)

        router = self.router.forward
        self.router.forward = routed
        try:
            return right(self, x, seq)
        finally:
            self.router.forward = router

    right = moe.MoE.forward
    moe.MoE.forward = forward


def auxiliary_twice() -> None:
    """The balance loss is right and its gradient counts twice."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, 2 * grad.new_ones((), dtype=ctx.dtype)

    record._Charge.backward = staticmethod(backward)


def loads_over_data() -> None:
    """Routers remember the loads of the ranks that have other sequences, and leave out those that share them."""

    def losses(engine: native.NativeEngine, out: Forward) -> Any:
        engine.own = {layer: value.clone() for (layer, name), value in out.tallies.items() if name == "load"}
        return right(engine, out)

    def settle(engine: native.NativeEngine) -> None:
        engine.loads = {layer: engine.total(load, engine.mesh.data) for layer, load in engine.own.items()}
        settled(engine)

    right, settled = native.NativeEngine.losses, native.NativeEngine.settle
    native.NativeEngine.losses, native.NativeEngine.settle = losses, settle


def loads_twice() -> None:
    """Tokens of experts are counted on each rank that has their sequence."""

    def call(self: Forward, part: Any, x: Tensor | None, micro: int) -> Tensor:
        found = right(self, part, x, micro)
        self.tallies = {key: value + value for key, value in self.tallies.items()}
        return found

    right = Forward.__call__
    Forward.__call__ = call


def norm_of_matrices() -> None:
    """The clip norm leaves out the gain of every norm."""
    keep: Callable[..., Tensor] = clip.global_norm
    everywhere("global_norm", keep, lambda weights: keep([each for each in weights if each.dim() > 1]))


def norm_counts_copies() -> None:
    """A gradient that is whole on each rank is counted on each of them."""
    clip.copies = lambda weight: 1


def update_by_shard() -> None:
    """The update of a matrix is normalised by the piece on this rank."""

    def step(self: torch.optim.AdamW, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.dim() > 1:
                    piece = weight.grad._local_tensor if isinstance(weight.grad, DTensor) else weight.grad
                    piece.div_(piece.norm() + 1e-6)
        right(self)

    right = torch.optim.AdamW.step
    torch.optim.AdamW.step = step


def gradients_lost() -> None:
    """The sums of one block never arrive in its pieces."""

    def forward_backward(engine: native.NativeEngine, batch: Any, step: int) -> Any:
        found = right(engine, batch, step)
        for name, weight in engine.model.named_parameters():
            if name.startswith("blocks.1."):
                weight.grad = None
        return found

    right = native.NativeEngine.forward_backward
    native.NativeEngine.forward_backward = forward_backward


def never_summed() -> None:
    """Micro-batches wait for one that is the last, and none is."""
    right = fully_shard.sync
    fully_shard.sync = lambda model, zero, *, last: right(model, 1, last=False)


def twins_apart() -> None:
    """The gradient of the tied head never reaches the embedding of the first stage."""

    def settle(self: twins.Twins) -> None:
        for _, twin, _, _ in self._pairs():
            twin.weight.grad = None

    twins.Twins.settle = settle


def seeded_by_rank() -> None:
    def fill(model: torch.nn.Module, seed: int) -> None:
        right(model, seed + dist.get_rank())

    right = native.fill
    native.fill = fill


def forgotten_moments() -> None:
    """A resume restores the weights alone."""

    def restore(model: Any, optimizer: Any, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("optim."):
                tensor.zero_()
        right(model, optimizer, tensors)

    right = state.restore
    state.restore = restore


def drifting_copies() -> None:
    """Copies of the norms on one rank of tp move away from the others."""

    def update(engine: native.NativeEngine, lr: float) -> Any:
        out = right(engine, lr)
        for name, weight in engine.model.named_parameters():
            if "norm" in name and engine.mesh.coordinate("tp") == 1:
                with torch.no_grad():
                    weight._local_tensor.add_(1e-6)
        return out

    right = native.NativeEngine.update
    native.NativeEngine.update = update


def doubled_evaluation() -> None:
    """Only the held-out loss is wrong."""

    def evaluate(engine: native.NativeEngine, batch: Any) -> Any:
        found = right(engine, batch)
        return native.Losses(found.loss * 1.5, found.terms, found.scored)

    right = native.NativeEngine.evaluate
    native.NativeEngine.evaluate = evaluate


def missing_rank() -> None:
    """The last rank leaves out a collective that the others wait in."""

    def total(engine: native.NativeEngine, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if dist.get_rank() == dist.get_world_size() - 1:
            import threading

            threading.Event().wait()
        return right(engine, x, group)

    right = native.NativeEngine.total
    native.NativeEngine.total = total


def dying_rank() -> None:
    def update(engine: native.NativeEngine, lr: float) -> Any:
        if dist.get_rank() == 1:
            print("out of memory", flush=True)
            os._exit(9)
        return right(engine, lr)

    right = native.NativeEngine.update
    native.NativeEngine.update = update


def raising_rank() -> None:
    def update(engine: native.NativeEngine, lr: float) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("a number too many")
        return right(engine, lr)

    right = native.NativeEngine.update
    native.NativeEngine.update = update


def refusing_engine() -> None:
    def check_fit(*_: Any) -> None:
        raise LayoutError("no engine for this", "parallel", "another engine")

    native.check_fit = check_fit


def padding_counts() -> None:
    """Positions without a token count in the share of the router's loss."""

    def forward(engine: native.NativeEngine, batch: Any, key: Tensor | None) -> Forward:
        out, place = right(engine, batch, key), None
        place = out.place

        def padded(piece: Any) -> Any:
            seq = place(piece)
            every = batch.tokens.numel() * engine.mesh.layout.data_ranks
            seq.shares = dataclasses.replace(seq.shares, tokens=every)
            return seq

        out.place = padded
        return out

    right = native.NativeEngine.forward
    native.NativeEngine.forward = forward


def piece_lost() -> None:
    """The last piece of an overlapped sum over tp is lost on the way back."""

    def backward(ctx: Any, grad: Tensor) -> Any:
        found = right(ctx, grad)
        last = found[0].shape[1] // overlap.PIECES
        found[0][:, -last:] = 0
        return found

    right = overlap._ProductScatterSum.backward
    overlap._ProductScatterSum.backward = staticmethod(backward)


def ranks_astray() -> None:
    """Meshes whose ranks do not ascend, while torch sorts the ranks of their groups."""
    right = Layout.placed
    Layout.placed = lambda layout: tuple(reversed(right(layout)))
