"""A rank of a pipeline: some stages of the model, run by a schedule of torch; and what a recipe must say for that."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch

from shardforge.core.errors import ForgeError, LayoutError, Problems, RecipeError
from shardforge.engine.forward import Forward
from shardforge.model import flops
from shardforge.model.decoder import Decoder
from shardforge.nn.module import declared
from shardforge.parallel import fully_shard, stages
from shardforge.parallel.mesh import Mesh
from shardforge.parallel.pipeline import Pipeline
from shardforge.parallel.stages import ORDERS, Stages, Work
from shardforge.parallel.twins import Twins, part_with_twins
from shardforge.recipe.schema import Recipe, TrainConfig

if TYPE_CHECKING:
    from shardforge.engine.kinds.native import NativeConfig


class Staged:
    """`parts` are the stages of this rank; `model` has their modules under the names of the whole model.

    `whole` has no storage yet; `width` and `dtype` are those of the stream between stages. Gradients are summed over
    the data ranks once, after a stage's last micro-batch, whatever `zero` is: torch's schedules keep them whole.
    """

    def __init__(self, whole: Decoder, cut: Stages, mesh: Mesh, device: torch.device, width: int, dtype: torch.dtype):
        self.mesh, self.width, self.dtype = mesh, width, dtype
        every = {stage: part(whole, cut, [stage]) for stage in range(len(cut))}
        group, held = mesh.group("pp"), cut.held(mesh.coordinate("pp"))
        self.twins = Twins(part_with_twins(every), cut.ranks, group, device)
        self.pipeline = Pipeline({stage: every[stage] for stage in held}, cut, group, device)
        self.model, self.parts = part(whole, cut, held), tuple(self.pipeline.parts.values())

    def train(self, forward: Forward) -> None:
        self.pipeline.train(forward, len(forward), self._streams(forward)[0])
        self.twins.settle()

    def count(self, forward: Forward) -> None:
        """The forward passes alone. What they gather stays for those of `train`."""
        self.pipeline.forward(forward, self._streams(forward))

    def evaluate(self, forward: Forward) -> None:
        self.count(forward)
        for each in self.parts:
            fully_shard.free(each)

    def renew(self) -> None:
        """To be called whenever weights have changed."""
        self.twins.renew()

    def _streams(self, forward: Forward) -> list[torch.Tensor]:
        """What stages pass on for each micro-batch, [b, s/tp, h], without storage."""
        tp, shapes = self.mesh.layout.tp, [piece.tokens.shape for piece in forward.pieces]
        return [torch.empty(b, s // tp, self.width, dtype=self.dtype, device="meta") for b, s in shapes]


def part(whole: Decoder, cut: Stages, held: Collection[int]) -> Decoder:
    """The modules of some stages."""
    layers = {layer for stage in held for layer in cut.span(stage)}
    return whole.part(layers, first=0 in held, last=len(cut) - 1 in held)


def cut(recipe: Recipe, cfg: NativeConfig, model: Decoder) -> Stages | None:
    """The stages of a recipe's pipeline, None without one. Everything that cannot work is refused here, at once."""
    pp, problems, found = recipe.parallel.pp, [], None
    if pp == 1:
        if cfg.stages is not None:
            raise LayoutError(f"{cfg.stages!r} cuts a pipeline, but pp=1", stages.WHERE, "leave it empty, or raise pp")
        return None
    problems += [*halves(cfg), *_read_twice(cfg, model)]
    try:
        found = stages.cut(cfg.schedule, pp, cfg.stages, work(model, recipe.train.seq_len))
        problems += _bare(model, found)
    except LayoutError as error:
        problems.append(error)
    for sequences in sizes(recipe.train):
        share = sequences // recipe.parallel.data_ranks
        try:
            stages.check_micro_batches(cfg.schedule, pp, share // (recipe.train.micro_batch or share), share)
        except LayoutError as error:
            problems.append(error)
            break
    if len(problems) > 1:
        raise Problems(problems, "the pipeline")
    if problems:
        raise problems[0]
    return found


def work(model: Decoder, length: int) -> Work:
    """What each piece of a model costs. A lookup is one FLOP a number read, and one more in the backward pass. What
    predicts further tokens stands behind the last block and scores them all again."""
    blocks = tuple(flops.forward_flops(block, length) for block in model.blocks.values())
    lookup = flops.forward_flops(model.embed, length) + float(length * model.width)
    last = (1 + model.ahead) * (flops.forward_flops(model.head, length) + flops.forward_flops(model.objective, length))
    if model.mtp is not None:
        last += flops.forward_flops(model.mtp, length) + model.ahead * lookup
    return Work(lookup, blocks, last)


def sizes(train: TrainConfig) -> list[int]:
    """Sequences of a step, each number that comes in a run."""
    ramp = train.batch_warmup
    return [*range(ramp.start, train.sequences, ramp.increment), train.sequences] if ramp else [train.sequences]


def halves(cfg: NativeConfig) -> Iterator[ForgeError]:
    """What a schedule that splits the backward pass cannot have."""
    if not ORDERS[cfg.schedule].split:
        return
    two, other = f"{cfg.schedule} runs the backward pass in two halves", "or schedule: interleaved"
    if cfg.recompute != "none":
        what = f"{two}, and each would compute every block again (pytorch#136766)"
        yield RecipeError(what, "engine.recompute", f"recompute: none, {other}")
    if cfg.compiled:
        what = f"{two}, and that of a compiled block is in one piece"
        yield RecipeError(what, "engine.compiled", f"compiled: false, {other}")
    if cfg.overlap:
        what = f"{two}, and overlapped matmuls do both at once: their work would be done twice"
        yield RecipeError(what, "engine.overlap", f"overlap: false, {other}")
    if cfg.zero == 3:
        what = f"{two}, and both need the same gathered weights; zero: 3 frees them in between"
        yield RecipeError(what, "engine.zero", f"zero: 2, {other}")


def _read_twice(cfg: NativeConfig, model: Decoder) -> Iterator[ForgeError]:
    """A table that the last stage reads in the middle of its graph and at its end: torch runs what lies between for
    each half of the backward pass, and the second time its buffers are gone."""
    tied = any(getattr(module, "borrowed", ()) for module in model.head.modules())
    if ORDERS[cfg.schedule].split and model.mtp is not None and tied:
        what = f"{cfg.schedule} runs the backward pass in two halves, and model.mtp and the head read the same table"
        yield RecipeError(what, "model.head", "head: linear, or engine.schedule: interleaved")


def _bare(model: Decoder, found: Stages) -> Iterator[ForgeError]:
    for rank in range(found.pp):
        if next(declared(part(model, found, found.held(rank))), None) is None:
            what = f"pipeline rank {rank} would hold no weight at all with {stages.write(found.layers)!r}"
            yield LayoutError(what, stages.WHERE, "give its stages a layer")
