"""What a rank computes of a task: everything that must not depend on the layout, under one key each.

A key is (phase, what, name): ("step 1", "gradient", "blocks.0.mixer.q.weight"). Phases in order: start, step 1, step 2,
..., held out, and resumed. Tensors are whole. Under a pipeline a rank knows the weights of its own stage only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardforge.checkpoint.store import Store
from shardforge.engine.base import Engine, Losses
from shardforge.model.build import build
from shardforge.nn.batch import Batch
from shardforge.recipe.schema import Recipe
from shardforge.verify.rows import batch, part

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Task:
    """`steps` optimizer steps of a small recipe, from the start or from the checkpoint of `load`."""

    recipe: Recipe
    steps: int
    gradients: bool = True  # False: only the weights and the state after the last step
    save: Path | None = None  # checkpoint here after the last step, then go on for one more
    load: Path | None = None


@dataclass
class Found:
    """A rank's share of what a task found. `prints` are of every tensor that it holds, `values` are those that no rank
    with a lower number holds."""

    values: dict[Key, Tensor] = field(default_factory=dict)
    prints: dict[Key, tuple[float, float]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def measure(task: Task) -> Found:
    """Collective over the pool."""
    recipe, layout = task.recipe, task.recipe.parallel
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    buffers = {name for name, _ in build(recipe.model, recipe.objective.build()).named_buffers()}
    held: dict[Key, Tensor] = {}
    rank = layout.data_rank(dist.get_rank())
    folder = task.save or task.load
    store = Store(folder, recipe.checkpoint, describe=engine.describe()) if folder is not None else None
    found = Found(order=order(engine, recipe) if layout.world_size == 1 and task.gradients and store is None else [])
    begin = 0
    if task.load is not None and store is not None:
        begin = store.committed()[-1]
        engine.load(lambda tensors: store.load(begin, tensors))
        held |= state("resumed", engine, buffers)
    elif task.gradients:
        held |= state("start", engine, buffers)
        held |= losses("start", engine.evaluate(part(batch(recipe, 99), rank, layout.data_ranks)))
    last = begin + task.steps + (task.save is not None)
    for step in range(begin, last):
        if task.save is not None and store is not None and step == last - 1:
            store.save(step, engine.state(), {}, wait=True)
        phase = f"step {step + 1}"
        turned = turn(engine, phase, part(batch(recipe, step), rank, layout.data_ranks), step, rate(recipe))
        if task.gradients:
            held |= turned
        if task.gradients or step == last - 1:
            held |= state(phase, engine, buffers)
    if task.gradients:
        held |= losses("held out", engine.evaluate(part(batch(recipe, 98), rank, layout.data_ranks)))
    if store is not None:
        store.close()
    found.prints = {key: fingerprint(value) for key, value in held.items()}
    found.values = owned(held)
    return found


def turn(engine: Engine, phase: str, mine: Batch, step: int, lr: float) -> dict[Key, Tensor]:
    """One step: losses, gradients and their norm."""
    out = losses(phase, engine.forward_backward(mine, step))
    out |= {(phase, "gradient", name): grad for name, grad in engine.gradients().items()}
    norm = engine.update(lr).grad_norm
    out[phase, "gradient norm", ""] = torch.tensor(norm, dtype=torch.float64)
    return out


def rate(recipe: Recipe) -> float:
    """The highest learning rate of the schedule: during warm-up an update would drown in the weight it is added to."""
    steps = recipe.train.steps
    return max(recipe.schedule.at(step * max(1, steps // 64), steps) for step in range(min(steps, 64)))


def losses(phase: str, found: Losses) -> dict[Key, Tensor]:
    terms = {"": found.loss, **found.terms}
    out = {
        (phase, "term" if name else "loss", name): torch.tensor(value, dtype=torch.float64)
        for name, value in terms.items()
    }
    for layer, tally in found.experts.items():
        out[phase, "expert load", f"of layer {layer}"] = torch.tensor(tally.load, dtype=torch.float64)
    return out | {(phase, "scored labels", ""): torch.tensor(float(found.scored), dtype=torch.float64)}


def state(phase: str, engine: Engine, buffers: Collection[str]) -> dict[Key, Tensor]:
    """Weights, what modules remember (`buffers`), and optimizer state, as a checkpoint has them."""
    out: dict[Key, Tensor] = {}
    for name, tensor in engine.state().items():
        kind, _, rest = name.partition(".")
        what = "optimizer state" if kind != "model" else "remembered" if rest in buffers else "weight"
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        out[phase, what, rest] = whole.detach().clone()
    return out


def fingerprint(value: Tensor) -> tuple[float, float]:
    """Norm, and projection on a fixed direction of length 1: two copies that differ by d differ by at most |d| here."""
    flat = value.double().flatten()
    direction = torch.cos(1.7 * torch.arange(flat.numel(), dtype=torch.float64) + 0.3)
    return flat.norm().item(), (flat @ direction / direction.norm()).item()


def owned(held: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """The tensors that no rank with a lower number holds too."""
    everyone: list[list[Key]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, list(held))
    lower = {key for keys in everyone[: dist.get_rank()] for key in keys}
    return {key: value for key, value in held.items() if key not in lower}


def order(engine: Engine, recipe: Recipe) -> list[str]:
    """Names of the weights of the engine's model in the order in which a forward pass enters their modules.

    A module that is read without being called stands where its parent does, and the head at the end.
    """
    model = getattr(engine, "model", None)
    if not isinstance(model, nn.Module):
        return []
    entered: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda m, _: entered.append(m)) for module in model.modules()]
    engine.evaluate(batch(recipe, 0))
    for hook in hooks:
        hook.remove()
    place = {id(module): index for index, module in reversed(list(enumerate(entered)))}
    named = dict(model.named_modules())

    def first(name: str) -> float:
        owner = name.rpartition(".")[0]
        while owner and id(named[owner]) not in place:
            owner = owner.rpartition(".")[0]
        return place[id(named[owner])] if owner else len(entered)

    return sorted((name for name, _ in model.named_parameters()), key=first)
