"""The engine of our own: one decoder, torch's FSDP2 underneath, our tensor pass, torch optimizers.

Paper: Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277.
Changes: nothing in the model; parallelism is a list of passes.
Cost: none beside the collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardforge.core.errors import RecipeError
from shardforge.core.options import option
from shardforge.core.slots import engines
from shardforge.engine.native import NativeEngine
from shardforge.parallel.recompute import Recompute
from shardforge.recipe.schema import Recipe


@engines.register("native")
@dataclass(frozen=True, kw_only=True)
class NativeConfig:
    recompute: Recompute = option(
        "none", "none keeps all activations; full keeps a block's input; selective keeps matmuls and attention"
    )
    compiled: bool = option(False, "torch.compile each block")
    resharded: bool = option(True, "free gathered weights between forward and backward (ZeRO-3); false is ZeRO-2")

    def __post_init__(self) -> None:
        if self.compiled and self.recompute == "selective":
            raise RecipeError(
                "selective recompute cannot look into compiled blocks, where everything would be computed again",
                fix="recompute: full, or compiled: false",
            )

    def build(self, recipe: Recipe, device: torch.device) -> NativeEngine:
        return NativeEngine(recipe, self, device)
