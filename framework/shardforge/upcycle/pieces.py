"""The numbers of one job's tensors, one piece after another, with little more than one dense matrix in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardforge.checkpoint.tensorfile import TYPES, Part
from shardforge.families.source import Source
from shardforge.upcycle.measure import Gauge
from shardforge.upcycle.method import Draw, Edit
from shardforge.upcycle.normals import Normals
from shardforge.upcycle.plan import Item, Plan, is_expert, matrix_of
from shardforge.upcycle.target import Layer
from shardforge.upcycle.transform import Dense, write

ROUTERS: dict[str, Any] = {
    "uniform_zero_mean": lambda draw, shape: _centered(draw.random(shape, dtype=np.float32)),
    "normal_002": lambda draw, shape: draw.standard_normal(shape, dtype=np.float32) * np.float32(0.02),
    "uniform": lambda draw, shape: draw.random(shape, dtype=np.float32),
    "normal_02887": lambda draw, shape: draw.standard_normal(shape, dtype=np.float32) * np.float32(0.2887),
}


@dataclass
class Maker:
    """Makes the pieces of one job, in the order of `Plan.items`; a piece is good until the next is made."""

    plan: Plan
    job: int
    source: Source
    gauge: Gauge | None = None
    _dense: tuple[str, str, Dense] | None = None
    _room: dict[tuple[tuple[int, ...], str], Tensor] = field(default_factory=dict)

    def part(self, item: Item) -> Part:
        return Part(item.key, item.dtype, item.sizes, partial(self.make, item))

    def make(self, item: Item) -> Tensor:
        """The numbers of `item`, in its type."""
        dtype, layer = TYPES[item.dtype][0], self.plan.layer(self.job)
        if layer is None or ".ffn." not in item.weight:
            return self._copied(item).to(dtype)
        rest = item.weight.partition(".ffn.")[2]
        if item.kind in self.plan.counts:
            return self._count(item, layer, rest).to(dtype)
        if is_expert(item.weight):
            return self._expert(item, layer)
        if rest == "router.weight" and not item.kind:
            return router(self.plan.options.seed, self.plan.options.router_init, layer).to(dtype)
        if rest.startswith("shared."):
            return self._shared(item, layer, rest.removeprefix("shared.")).to(dtype).contiguous()
        return torch.zeros(item.sizes, dtype=dtype)

    def _copied(self, item: Item) -> Tensor:
        if item.weight in self.plan.source_weights:
            return self._read(item.weight, item.kind)
        return torch.zeros(item.sizes)  # what the model remembers, before the first step

    def _read(self, name: str, kind: str) -> Tensor:
        return self.source.read_moment(kind, name) if kind else self.source.read(name)

    def _shared(self, item: Item, layer: Layer, name: str) -> Tensor:
        if name == "down.bias":
            return torch.zeros(item.sizes)  # the experts have it
        weight = self._read(f"blocks.{layer.number}.ffn.{name}", item.kind)
        return weight[:, : layer.shared] if name == "down.weight" else weight[: layer.shared]

    def _count(self, item: Item, layer: Layer, rest: str) -> Tensor:
        """Of the dense weight that a weight was made of; 0 for what is new, as are all of its moments."""
        dense = f"blocks.{layer.number}.ffn"
        if is_expert(item.weight):
            matrix, _, bias = matrix_of(item.weight).partition("_")
            return self._read(f"{dense}.{matrix}.{bias or 'weight'}", item.kind)
        name = rest.removeprefix("shared.")
        return torch.zeros(()) if name in (rest, "down.bias") else self._read(f"{dense}.{name}", item.kind)

    def _expert(self, item: Item, layer: Layer) -> Tensor:
        assert item.expert is not None
        name = matrix_of(item.weight)
        out = self._space(item)
        if name == "down_bias":
            kept = self.plan.options.method.keeps_output_bias
            bias = self._read(f"blocks.{layer.number}.ffn.down.bias", item.kind).float()
            return out.copy_(bias * (layer.output_bias if not item.kind else 1.0) if kept else torch.zeros_like(bias))
        dense = self._loaded(layer, name, item.kind)
        draw = Draw(self.plan.options.seed, layer.number, item.expert)
        neurons = self.plan.options.method.neurons(draw, layer.shape)
        edit = self.plan.options.method.edit(draw, layer.shape, name, dense.moments, neurons)
        numbers = out[0] if out.dim() == 3 else out
        if item.kind:
            write(numbers, dense, neurons, Edit(edit.redrawn), Normals(draw.generator("none")))
            return out
        gauge = self._gauge(layer)
        biased = name.endswith("_bias")
        seen = None if biased else gauge.watch(name, item.expert)
        write(numbers, dense, neurons, edit, Normals(draw.generator(f"noise/{name}")), layer.factor, seen)
        if biased:
            gauge.expert_biases[name.removesuffix("_bias"), item.expert] = numbers[0].float()
        else:
            gauge.expert(name, item.expert, numbers, neurons, edit)
        return out

    def _space(self, item: Item) -> Tensor:
        """Memory for one expert's piece, the same for all of one shape."""
        key = item.sizes, item.dtype
        if key not in self._room:
            self._room[key] = torch.empty(item.sizes, dtype=TYPES[item.dtype][0])
        return self._room[key]

    def _gauge(self, layer: Layer) -> Gauge:
        if self.gauge is None:
            inner = [name for name in layer.matrices if name != "down"]
            prefix = f"blocks.{layer.number}.ffn"
            biases = {name: self.source.read(f"{prefix}.{name}.bias").float() for name in inner if layer.bias}
            self.gauge = Gauge(layer, self.plan.options.seed, biases)
        return self.gauge

    def _loaded(self, layer: Layer, name: str, kind: str) -> Dense:
        """The dense matrix; the one before it is let go first."""
        if self._dense is None or self._dense[:2] != (name, kind):
            self._dense = None
            matrix, _, bias = name.partition("_")
            weight = self._read(f"blocks.{layer.number}.ffn.{matrix}.{bias or 'weight'}", kind)
            dense = Dense.of(weight, 0 if name == "down" else 1)
            self._dense = name, kind, dense
            if not kind and not bias:
                self._gauge(layer).dense(name, dense)
        return self._dense[2]


def router(seed: int, init: str, layer: Layer) -> Tensor:
    """Router rows [experts, hidden] in float32; `layer.group` consecutive ones are the same."""
    rows = ROUTERS[init](Draw(seed, layer.number).generator("router"), (layer.experts // layer.group, layer.hidden))
    return torch.from_numpy(rows).repeat_interleave(layer.group, 0)


def _centered(uniform: np.ndarray) -> np.ndarray:
    return (uniform - uniform.mean(dtype=np.float64).astype(np.float32)) * np.float32(0.02 * 12**0.5)
