"""What the report says of one layer, measured while its experts pass by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.model.activations import CURVES
from shardforge.upcycle.method import Draw, Edit, Indices
from shardforge.upcycle.target import Layer
from shardforge.upcycle.transform import Dense, Seen, bands

SAMPLED_NUMBERS = 1 << 16
"""Numbers of one matrix of one expert that means, deviations and cosines of weights are taken from, about."""
PROBE_NUMBERS = 1 << 15
"""Numbers of the random inputs that cosines of outputs are taken from, about."""
PROBED_EXPERTS = 4
"""The first experts, of which outputs are compared; weights are compared of all."""


@dataclass
class _Weights:
    """Samples of one matrix of all experts: the same hidden channels of each, in the order of the dense neurons."""

    channels: slice
    dense: Tensor  # [channels, f]
    redrawn: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)


@dataclass
class Gauge:
    """Call `dense` and then `expert` for every expert, matrix after matrix; then `report`."""

    layer: Layer
    seed: int
    biases: Mapping[str, Tensor]  # of the dense ffn
    weights: dict[str, _Weights] = field(default_factory=dict)
    inner: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)  # products of probe and matrix
    outputs: dict[int | None, Tensor] = field(default_factory=dict)
    expert_biases: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = max(4, min(512, PROBE_NUMBERS // self.layer.hidden))
        draw = Draw(self.seed, self.layer.number).generator("probe")
        self.probe = torch.from_numpy(draw.standard_normal((rows, self.layer.hidden), dtype=np.float32))

    def dense(self, name: str, dense: Dense) -> None:
        """The dense matrix, before its experts."""
        width = max(1, min(self.layer.hidden, SAMPLED_NUMBERS // self.layer.dense))
        first = (self.layer.hidden - width) // 2
        channels = slice(first, first + width)
        self.weights[name] = _Weights(channels, _sample(dense.numbers, dense.axis, channels))
        seen = self._product(name, None)
        for band in bands(*dense.numbers.shape):
            seen(band, dense.numbers[band].float())
        if name == "down":
            self.outputs[None] = self.inner.pop((name, None))

    def watch(self, name: str, expert: int) -> Seen | None:
        """What `transform.write` is to tell about the bands of this matrix."""
        return self._product(name, expert) if expert < PROBED_EXPERTS else None

    def expert(self, name: str, expert: int, numbers: Tensor, neurons: Indices | None, edit: Edit) -> None:
        """A finished matrix."""
        held, axis = self.weights[name], 0 if name == "down" else 1
        sample = _sample(numbers, axis, held.channels)
        std, mean = torch.std_mean(sample)
        held.means.append(mean.item())
        held.stds.append(std.item() if sample.numel() > 1 else 0.0)
        held.redrawn.append(len(edit.redrawn) / self.layer.expert)
        order = torch.arange(self.layer.dense) if neurons is None else torch.from_numpy(neurons)
        held.cosines.append(F.cosine_similarity(sample.flatten(), held.dense[:, order].flatten(), 0).item())
        placed = torch.zeros_like(held.dense)
        placed[:, order] = sample
        held.samples.append(placed.flatten())
        if name == "down" and expert < PROBED_EXPERTS:
            self.outputs[expert] = self.inner.pop((name, expert))

    def report(self) -> dict[str, object]:
        """Plain data: by matrix means over the experts, and cosines of what dense ffn and experts make of a probe."""
        matrices = {}
        for name, held in self.weights.items():
            std, mean = torch.std_mean(held.dense)
            matrices[name] = {
                "redrawn": _mean(held.redrawn),
                "source_mean": mean.item(),
                "source_std": std.item() if held.dense.numel() > 1 else 0.0,
                "mean": _mean(held.means),
                "std": _mean(held.stds),
                "cosine_to_dense": _mean(held.cosines),
                "cosine_between_experts": _between([sample[None] for sample in held.samples]),
            }
        dense = self.outputs.pop(None)
        experts = [self.outputs[number] for number in sorted(key for key in self.outputs if key is not None)]
        return {
            "layer": self.layer.number,
            "matrices": matrices,
            "output_cosine_to_dense": _mean([F.cosine_similarity(y, dense, -1).mean().item() for y in experts]),
            "output_cosine_between_experts": _between(experts),
        }

    def _product(self, name: str, expert: int | None) -> Seen:
        """Adds up probe x matrix, or for down the activations x matrix."""
        left = self._activations(expert) if name == "down" else self.probe
        key = name, expert

        def seen(band: slice, rows: Tensor) -> None:
            part = left[:, band] @ rows
            if key in self.inner:
                self.inner[key] += part
            else:
                self.inner[key] = part

        return seen

    def _activations(self, expert: int | None) -> Tensor:
        curve = CURVES[self.layer.activation]
        read = {name: self._with_bias(name, expert) for name in self.layer.matrices if name != "down"}
        up = read["up"]
        return curve(read["gate"]) * up if "gate" in read else curve(up)

    def _with_bias(self, name: str, expert: int | None) -> Tensor:
        product = self.inner.pop((name, expert))
        bias = self.biases.get(name) if expert is None else self.expert_biases.get((name, expert))
        return product if bias is None else product + bias


def _sample(numbers: Tensor, axis: int, channels: slice) -> Tensor:
    """[channels, neurons] in float32."""
    return numbers[channels].float() if axis == 1 else numbers[:, channels].t().float()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _between(vectors: list[Tensor]) -> float | None:
    """Mean cosine over all pairs of experts and over rows; None for a single expert."""
    n = len(vectors)
    if n < 2:
        return None
    together = sum(F.normalize(vector, dim=-1) for vector in vectors)
    assert isinstance(together, Tensor)
    ones = sum((vector.norm(dim=-1) > 0).to(torch.float32) for vector in vectors)
    return ((together.square().sum(-1) - ones) / (n * (n - 1))).mean().item()
