"""What a kind is told when it is built: its place in the model and how weights start."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from shardforge.core.dims import Dim
from shardforge.nn.init import normal
from shardforge.nn.module import Init
from shardforge.recipe.model import InitConfig


@dataclass(frozen=True)
class BuildContext:
    hidden: Dim
    vocab: Dim
    layers: int
    init: InitConfig
    core: Any = None  # config of the attention core
    layer: int = 0  # index from the first layer, 0-based and global
    ffns: tuple[Any, ...] = ()  # configs of the ffns of all layers

    def at(self, layer: int) -> BuildContext:
        return replace(self, layer=layer)

    def into(self, inp: Dim) -> Init:
        """Start of a matrix that reads `inp` and stays inside a branch."""
        return normal(1 / math.sqrt(inp.size) if self.init.rule == "fan_in" else self.init.std)

    def out_of(self, inp: Dim) -> Init:
        """Start of a matrix that reads `inp` and writes to the residual stream."""
        if self.init.rule == "depth_scaled":
            return normal(self.init.std / math.sqrt(2 * self.layers))
        return self.into(inp)

    def table(self) -> Init:
        """Start of a lookup table."""
        return normal(self.init.table_std or self.init.std)
