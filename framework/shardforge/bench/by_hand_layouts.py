"""Four layouts of two ranks written by hand (bench/by_hand.py has the arithmetic): tp2, dp2, pp2 and dp2-ep2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from shardforge.bench import by_hand as hand
from shardforge.bench.by_hand import Gather, Scatter, Sizes, Weights
from shardforge.nn.batch import Batch
from shardforge.nn.head import VocabSplit

ALONE = VocabSplit()


def adam(weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


class Tensors:
    """tp2 with sequence parallelism: heads, channels and vocabulary split, norms and sums on own positions."""

    def __init__(self, sizes: Sizes, whole: Mapping[str, Tensor], split: Mapping[str, int]):
        self.sizes, self.group, self.rank = sizes, dist.group.WORLD, dist.get_rank()
        self.w = {
            name: nn.Parameter(w.chunk(2, split[name])[self.rank].clone() if name in split else w.clone())
            for name, w in whole.items()
        }
        self.whole = [name for name in whole if name not in split]
        self.leaves = list(self.w.values())
        self.once = [0.5 if name in self.whole else 1.0 for name in self.w]
        self.optimizer = adam(self.leaves)

    def step(self, batch: Batch) -> float:
        w, sizes, count = self.w, self.sizes, hand.scored(batch, None)
        rows = w["embed.weight"].shape[0]
        index = batch.tokens - self.rank * rows
        mine = (index >= 0) & (index < rows)
        x = F.embedding(index.clamp(0, rows - 1), w["embed.weight"]) * mine[..., None]
        x = Scatter.apply(x, self.group)
        seq = hand.tables(batch, sizes.width)
        enter, leave = (lambda y: Gather.apply(y, self.group)), (lambda y: Scatter.apply(y, self.group))
        for layer in range(sizes.layers):
            x = hand.block(x, w, f"blocks.{layer}", sizes, seq, enter=enter, leave=leave)
        x = enter(hand.rms_norm(x, w["norm.weight"], hand.EPS))
        split = VocabSplit(self.rank * w["head.weight"].shape[0], self.group)
        total = hand.score(x, w["head.weight"], batch.labels, split)
        (total / count).backward()
        flat = torch.cat([w[name].grad.flatten() for name in self.whole])
        dist.all_reduce(flat)
        for name, piece in zip(self.whole, flat.split([w[name].numel() for name in self.whole]), strict=True):
            w[name].grad.copy_(piece.view_as(w[name]))
        hand.update(self.leaves, self.optimizer, self.once.__getitem__)
        return total.item() / count


class _Whole(Function):
    """A flat shard to the whole flat weight of a unit; backward sums over ranks and keeps the shard."""

    @staticmethod
    def forward(ctx, shard):
        out = shard.new_empty(2 * shard.numel())
        hand._all_gather(out, shard)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(grad.numel() // 2)
        hand._reduce_scatter(out, grad.contiguous())
        return out


class Unit:
    """Weights that are gathered together: one flat shard a rank."""

    def __init__(self, whole: Mapping[str, Tensor]):
        self.shapes = {name: w.shape for name, w in whole.items()}
        flat = torch.cat([w.flatten() for w in whole.values()])
        flat = F.pad(flat, (0, flat.numel() % 2))
        self.rest = flat.numel() - sum(w.numel() for w in whole.values())
        self.shard = nn.Parameter(flat.chunk(2)[dist.get_rank()].clone())

    def weights(self) -> Weights:
        sizes = [shape.numel() for shape in self.shapes.values()]
        pieces = _Whole.apply(self.shard).split([*sizes, self.rest])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=False)}


class Shards:
    """dp2, ZeRO-2: each rank its rows; a block's weights gathered once a step, its gradients reduce-scattered.

    With experts, dp2-ep2: each rank half of them whole, tokens travel.
    """

    def __init__(self, sizes: Sizes, whole: Mapping[str, Tensor], split: Mapping[str, int]):
        self.sizes = sizes
        here = {name: w for name, w in whole.items() if ".experts." in name}
        self.local = {name: nn.Parameter(w.chunk(2, 0)[dist.get_rank()].clone()) for name, w in here.items()}
        names = [name for name in whole if name not in here]
        prefixes = [f"blocks.{layer}." for layer in range(sizes.layers)]
        self.units = [Unit({n: whole[n] for n in names if n.startswith(prefix)}) for prefix in prefixes]
        self.rest = Unit({n: whole[n] for n in names if not n.startswith("blocks.")})
        self.leaves = [self.rest.shard, *(unit.shard for unit in self.units), *self.local.values()]
        self.optimizer = adam(self.leaves)

    def step(self, batch: Batch) -> float:
        sizes, count = self.sizes, hand.scored(batch, dist.group.WORLD)
        rest = self.rest.weights()
        x = F.embedding(batch.tokens, rest["embed.weight"])
        seq = hand.tables(batch, sizes.width)
        ffn: Callable[[Tensor, Weights, str], Tensor] = hand.glu
        if sizes.experts:
            ffn = partial(hand.experts, sizes=sizes, group=dist.group.WORLD)
        for layer, unit in enumerate(self.units):
            x = hand.block(x, unit.weights() | self.local, f"blocks.{layer}", sizes, seq, ffn)
        x = hand.rms_norm(x, rest["norm.weight"], hand.EPS)
        total = hand.score(x, rest["head.weight"], batch.labels, ALONE)
        (total / count).backward()
        hand.update(self.leaves, self.optimizer, lambda n: 1.0)
        total = total.detach()
        dist.all_reduce(total)
        return total.item() / count


class Stages:
    """pp2 under 1F1B: the first rank has the embedding and half of the blocks, the second the rest and the loss."""

    def __init__(self, sizes: Sizes, whole: Mapping[str, Tensor], split: Mapping[str, int]):
        self.sizes, self.rank = sizes, dist.get_rank()
        cut = sizes.layers // 2
        self.layers = range(cut) if self.rank == 0 else range(cut, sizes.layers)
        prefixes = tuple(f"blocks.{layer}." for layer in self.layers)
        prefixes += ("embed.",) if self.rank == 0 else ("norm.", "head.")
        self.w = {name: nn.Parameter(w.clone()) for name, w in whole.items() if name.startswith(prefixes)}
        self.leaves = list(self.w.values())
        self.optimizer = adam(self.leaves)

    def step(self, batch: Batch, pieces: int = 4) -> float:
        count = hand.scored(batch, None)
        parts = list(batch.split(len(batch) // pieces))
        total = self.first(parts) if self.rank == 0 else self.last(parts, count)
        hand.update(self.leaves, self.optimizer, lambda n: 1.0)
        dist.all_reduce(total)
        return total.item() / count

    def blocks(self, x: Tensor, part: Batch) -> Tensor:
        seq = hand.tables(part, self.sizes.width)
        for layer in self.layers:
            x = hand.block(x, self.w, f"blocks.{layer}", self.sizes, seq)
        return x

    def first(self, parts: list[Batch]) -> Tensor:
        outs: list[Tensor] = []
        sends = []

        def forward(part: Batch) -> None:
            outs.append(self.blocks(F.embedding(part.tokens, self.w["embed.weight"]), part))
            sends.append(dist.isend(outs[-1].detach(), 1))

        forward(parts[0])
        for index in range(len(parts)):
            if index + 1 < len(parts):
                forward(parts[index + 1])
            grad = torch.empty_like(outs[index])
            dist.recv(grad, 1)
            outs[index].backward(grad)
        for send in sends:
            send.wait()
        return torch.zeros(())

    def last(self, parts: list[Batch], count: int) -> Tensor:
        total, sends = torch.zeros(()), []
        for part in parts:
            x = torch.empty(*part.tokens.shape, self.sizes.hidden).requires_grad_()
            with torch.no_grad():
                dist.recv(x, 0)
            y = hand.rms_norm(self.blocks(x, part), self.w["norm.weight"], hand.EPS)
            found = hand.score(y, self.w["head.weight"], part.labels, ALONE)
            (found / count).backward()
            sends.append(dist.isend(x.grad, 0))
            total += found.detach()
        for send in sends:
            send.wait()
        return total


LAYOUTS = {"tp2": Tensors, "dp2": Shards, "pp2": Stages, "dp2-ep2": Shards}
