"""Dense models for upcycling tests, and one expert of an ffn without any file."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.families.open import open_source
from shardforge.families.source import Source
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.recipe.load import from_mapping
from shardforge.recipe.provenance import dump
from shardforge.upcycle.method import Draw, Edit, Shape
from shardforge.upcycle.normals import Normals
from shardforge.upcycle.transform import Dense, write
from tests.tiny import GQA, mapping

FFN = {"kind": "glu", "inner": 24}
STD = {"gate": 0.3, "up": 0.3, "down": 0.3, "gate_bias": 0.0, "up_bias": 0.0}


def save(path: Path, *, trained: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A run directory with one checkpoint; `trained` ones have moments. Norms and biases are random too."""
    numbers = {"master": "fp32", "compute": "fp32", "reduce": "fp32"}
    recipe = from_mapping(mapping(**{"ffn": FFN, "precision": numbers} | changes)).recipe
    model = build(recipe.model, recipe.objective.build(), dtype).to_empty(device="cpu")
    fill(model, 3)
    chance = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn(weight.shape, generator=chance)
    optimizer = recipe.optim.build(model) if trained else None
    tensors = collect(model, optimizer)
    for name, tensor in tensors.items():
        if name.startswith("optim."):
            random = torch.rand(tensor.shape, generator=chance) + 1
            tensor.copy_(torch.tensor(7.0) if name.endswith(".step") else random)
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump(recipe))
    store = Store(path / "checkpoints", recipe.checkpoint, describe={"model": table(model)})
    store.save(7, tensors, {}, wait=True)
    store.close()
    return path


def block(**changes: Any) -> dict[str, Any]:
    return {"mixer": GQA, "ffn": FFN, "residual": {"kind": "pre"}} | changes


def contents(path: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def dying(path: Path) -> Source:
    """Opens a source here, and kills the worker that it is called in."""
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return open_source(path)


def glu(hidden: int, inner: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of Linears [out, in] that give a gate a spread of 2 on normal inputs. It matters for sets of their own:
    where only the gate was drawn anew the mean of silu is left of the neuron, a fifth of it here."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {name: 2 * hidden**-0.5 * torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def expert(
    method: Any, ffn: Mapping[str, Tensor], number: int, *, width: int | None = None, experts: int = 8, seed: int = 1,
    layer: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Edit], np.ndarray]:  # fmt: skip
    """One expert's matrices as Linears have them, what was changed in each, and the neurons that it was given."""
    inner = ffn["down"].shape[1]
    shape = Shape(inner, width or inner, experts, STD)
    draw = Draw(seed, layer, number)
    neurons = method.neurons(draw, shape)
    out, edits = {}, {}
    for name, weight in ffn.items():
        dense = Dense.of(weight, 0 if name == "down" else 1)
        edits[name] = method.edit(draw, shape, name, dense.moments, neurons)
        size = list(dense.numbers.shape)
        size[dense.axis] = shape.expert
        numbers = torch.empty(size)
        write(numbers, dense, neurons, edits[name], Normals(draw.generator(f"noise/{name}")))
        out[name] = numbers.t()
    return out, edits, np.arange(inner) if neurons is None else neurons


def forward(ffn: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ ffn["gate"].t()) * (x @ ffn["up"].t())) @ ffn["down"].t()
