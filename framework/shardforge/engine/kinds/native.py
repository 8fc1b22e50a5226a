"""The engine of our own: one decoder, torch's FSDP2 underneath, our tensor pass, torch optimizers.

Paper: Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277.
Changes: nothing in the model; parallelism is a list of passes.
Cost: none beside the collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from shardforge.core.errors import RecipeError
from shardforge.core.layout import RULES, Layout
from shardforge.core.log import logger
from shardforge.core.options import option
from shardforge.core.slots import engines
from shardforge.engine.native import NativeEngine
from shardforge.engine.staged import cut
from shardforge.model.decoder import Decoder
from shardforge.nn.module import declared
from shardforge.parallel import context
from shardforge.parallel.offload import Offload
from shardforge.parallel.recompute import Recompute
from shardforge.recipe.schema import Recipe

log = logger("engine")


@engines.register("native")
@dataclass(frozen=True, kw_only=True)
class NativeConfig:
    recompute: Recompute = option(
        "none", "none keeps all activations; full keeps a block's input; selective keeps matmuls and attention"
    )
    compiled: bool = option(False, "torch.compile each block")
    zero: Literal[1, 2, 3] = option(
        3,
        "what dp_shard ranks do not keep whole: 1 the optimizer states; 2 also gradients; 3 also weights between the "
        "forward and the backward pass",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"] = option(
        "1f1b", "order of forward and backward passes of the micro-batches over the stages of a pipeline"
    )
    stages: str | None = option(
        None, "layers of each pipeline stage in order, like '3 | 4 x 6 | 3'; empty balances their cost"
    )
    context: Literal["auto", "gather", "ring", "ulysses"] = option(
        "auto", "how attention reaches the positions of other cp ranks; auto decides layer by layer"
    )
    dispatch: Literal["auto", "gather", "exchange", "two_hop", "deepep"] = option(
        "auto", "how tokens reach the ranks of their experts"
    )
    overlap: bool = option(False, "run the gathers and sums of tp in pieces beside the matmuls that need them")
    offload: tuple[Offload, ...] = option((), "what waits in the memory of the CPU while the device does not need it")

    def __post_init__(self) -> None:
        if self.compiled and self.recompute == "selective":
            raise RecipeError(
                "selective recompute cannot look into compiled blocks, where everything would be computed again",
                fix="recompute: full, or compiled: false",
            )
        if self.recompute == "selective" and "activations" in self.offload:
            raise RecipeError(
                "what selective recompute keeps stays on the device, out of reach of offload: [activations]",
                fix="recompute: full or none, or no activations in offload",
            )
        if self.overlap and self.compiled:
            raise RecipeError(
                "overlap waits for collectives inside a block, which torch.compile cannot trace",
                fix="overlap: false, or compiled: false",
            )

    def check(self, recipe: Recipe, model: Decoder) -> None:
        """Refuse what this engine cannot do with a recipe, all at once; `model` needs no storage."""
        context.check(model, recipe.parallel, self.context)
        cut(recipe, self, model)
        for line in self.idle(recipe.parallel, model):
            log.warning("%s", line)

    def idle(self, layout: Layout, model: Decoder) -> Iterator[str]:
        """What the recipe asks for and nothing in this layout or model uses."""
        for name, axis in {"schedule": "pp", "context": "cp", "overlap": "tp", "dispatch": "ep"}.items():
            if getattr(self, name) != getattr(NativeConfig, name) and layout.degree(axis) == 1:
                yield f"engine.{name}: {getattr(self, name)} changes nothing with {axis}=1"
        split = {RULES.get(dim.name) for item in declared(model) for dim in item.dims}
        for axis in ("ep", "etp"):
            if layout.degree(axis) > 1 and axis not in split:
                yield f"parallel.{axis}={layout.degree(axis)} changes nothing: the model has no experts"

    def build(self, recipe: Recipe, device: torch.device) -> NativeEngine:
        return NativeEngine(recipe, self, device)
