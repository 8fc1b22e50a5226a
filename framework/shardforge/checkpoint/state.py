"""What a checkpoint holds, under which names, and how it returns into a model and its optimizer.

    model.<weight or persistent buffer>        tied weights once, under their first name
    optim.<weight>.<exp_avg, exp_avg_sq, ...>  whatever tensors and numbers the optimizer keeps for a weight

Names and whole shapes do not depend on the layout, so any layout can load any other's checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardforge.checkpoint.tensorfile import type_name
from shardforge.core.errors import CheckpointError
from shardforge.nn.module import declared

NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


def table(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> {"dims": ["heads=8*64", ...], "shape": whole shape, "dtype": "float32"} of what `model.` will hold."""
    dims = {weight.fqn: [str(dim) for dim in weight.dims] for weight in declared(model)}
    return {
        name: {"dims": dims.get(name, []), "shape": list(tensor.shape), "dtype": type_name(tensor.dtype)}
        for name, tensor in _model(model)
    }


def collect(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """The live tensors of a model and its optimizer by name, to save from or to load into.

    Tensors share memory with the training state. Numbers an optimizer keeps come as copies of shape []: after loading,
    hand the result to `restore`. Optimizer state that does not exist yet is created first; weights and gradients stay.
    """
    out = {f"model.{name}": tensor.detach() for name, tensor in _model(model)}
    if optimizer is not None:
        materialise(optimizer)
        for name, state, key in _optimizer(model, optimizer):
            value = state[key]
            out[name] = value.detach() if isinstance(value, Tensor) else _as_tensor(value, name)
    return out


def restore(model: nn.Module, optimizer: Optimizer | None, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` (all that `collect` names, no more, in the same layout) back in place.

    Raises CheckpointError before anything is changed when names or shapes differ.
    """
    current = collect(model, optimizer)
    missing, extra = sorted(current.keys() - tensors.keys()), sorted(tensors.keys() - current.keys())
    odd = [name for name in sorted(current.keys() & tensors.keys()) if current[name].shape != tensors[name].shape]
    if missing or extra or odd:
        raise CheckpointError(
            f"{len(missing)} tensors are missing {missing[:8]}, {len(extra)} are unknown {extra[:8]}, "
            f"{len(odd)} have another shape {odd[:8]}",
            "restore",
            "restore the state of the same model and the same optimizer",
        )
    with torch.no_grad():
        for name, target in current.items():
            mine, theirs = _piece(target), _piece(tensors[name])
            if mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)
    for name, state, key in _optimizer(model, optimizer) if optimizer is not None else ():
        if not isinstance(state[key], Tensor):
            state[key] = type(state[key])(tensors[name].item())


def materialise(optimizer: Optimizer) -> None:
    """Create the state of every weight that has none, as it stands before the first update.

    The optimizer takes a step of a stand-in with zero weights and zero gradients, so the weights themselves are never
    touched; then `step` is set back to 0. Exact for optimizers whose moments begin at zero (Adam, Lion, Muon).
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            for weight in group["params"]:
                if weight.requires_grad and not optimizer.state.get(weight):
                    _stand_in(optimizer, group, weight)
    finally:
        optimizer.param_groups = groups


def _stand_in(optimizer: Optimizer, group: dict[str, Any], weight: Tensor) -> None:
    double = nn.Parameter(torch.zeros_like(weight, requires_grad=False))
    double.__dict__.update(weight.__dict__)
    double.grad = torch.zeros_like(double, requires_grad=False)
    optimizer.param_groups = [{**group, "params": [double]}]
    optimizer.step()
    state = optimizer.state.pop(double, {})
    if not state:
        return
    if isinstance(state.get("step"), Tensor):
        state["step"].zero_()
    elif "step" in state:
        state["step"] = type(state["step"])(0)
    optimizer.state[weight] = state


def _model(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer


def _optimizer(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name in the checkpoint, the state of a weight, key therein), in the order of the model."""
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        if id(weight) in held:
            state = optimizer.state.get(weight, {})
            yield from ((f"optim.{name}.{key}", state, key) for key, value in state.items() if value is not None)


def _as_tensor(value: object, name: str) -> Tensor:
    if type(value) not in NUMBERS:
        raise CheckpointError(
            f"{name} is a {type(value).__name__}; a checkpoint holds tensors and numbers",
            "optim",
            "keep it as a tensor in the optimizer's state",
        )
    return torch.tensor(value, dtype=NUMBERS[type(value)])


def _piece(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
