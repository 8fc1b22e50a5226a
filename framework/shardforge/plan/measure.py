"""Time of forward, input gradient and weight gradient of each kind of block, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core import units
from shardforge.core.errors import EngineError
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.nn.batch import Batch
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.parallel.stages import Stages, Work, balance
from shardforge.parallel.twins import part_with_twins
from shardforge.plan.simulate import Cost
from shardforge.precision.types import DTYPES
from shardforge.recipe.schema import Recipe

WEIGHTS = {"cpu": 100_000_000, "cuda": 4_000_000_000}
"""Most weights of a part that is timed."""
FLOP = {"cpu": 4e9, "cuda": 4e13}
"""Work of a timed forward pass: as many tokens are taken as fit, at most a whole sequence."""
REPEATS = 5


@dataclass(frozen=True)
class Measured:
    """Seconds for one sequence of `tokens` tokens; blocks by layer."""

    tokens: int
    first: Cost
    blocks: tuple[Cost, ...]
    last: Cost

    def work(self) -> Work:
        """For a cut into stages: seconds in the place of FLOP."""
        return Work(self.first.total, tuple(block.total for block in self.blocks), self.last.total)

    def balanced(self, stages: int) -> tuple[int, ...]:
        """Layers of each stage such that the slowest one is fastest."""
        return balance(self.work(), stages)

    def of(self, stages: Stages) -> list[Cost]:
        """Of each stage, scaled so that the mean rank takes 3 for a micro-batch."""
        each = []
        for stage in range(len(stages)):
            parts = [self.blocks[layer] for layer in stages.span(stage)]
            parts += [self.first] * (stage == 0) + [self.last] * (stage == len(stages) - 1)
            each.append(_sum(parts))
        scale = 3 * stages.pp / sum(cost.total for cost in each)
        return [cost * scale for cost in each]


def measure(recipe: Recipe, tell: Callable[[str], None]) -> Measured:
    """Time one layer of each kind, the embedding and the head, on the best device here, one process, no layout.

    EngineError for parts too large for this machine.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(recipe.model, recipe.objective.build(), DTYPES[recipe.precision.compute])
    kinds: dict[str, int] = {}
    for layer, name in enumerate(recipe.model.layers):
        kinds.setdefault(name, layer)
    parts = {name: model.part([layer], first=False, last=False) for name, layer in kinds.items()}
    parts |= {"embedding": model.part([], first=True, last=False), "head": model.part([], first=False, last=True)}
    part_with_twins(dict(enumerate(parts.values())))  # a tied head is timed without the embedding
    _check({name: flops.weights(part) for name, part in parts.items()}, device)
    tokens = _tokens(parts.values(), recipe, device)
    tell(
        f"timing {len(parts)} parts on {device.type}, {tokens} of {recipe.train.seq_len} tokens, one sequence, "
        f"{recipe.precision.compute}, fastest of {REPEATS}"
    )
    times: dict[str, Cost] = {}
    for name, part in parts.items():
        times[name] = cost = _timed(part, recipe, tokens, device)
        tell(
            f"  {name:<12} forward {units.seconds(cost.forward)}, input gradient {units.seconds(cost.input_grad)}, "
            f"weight gradient {units.seconds(cost.weight_grad)}"
        )
    blocks = tuple(times[name] for name in recipe.model.layers)
    return Measured(tokens, times["embedding"], blocks, times["head"])


def _check(weights: dict[str, int], device: torch.device) -> None:
    limit = WEIGHTS[device.type]
    large = {name: count for name, count in weights.items() if count > limit}
    if large:
        names = ", ".join(f"{name} ({units.count(count)})" for name, count in large.items())
        raise EngineError(
            f"too many weights to time on {device.type}, where a part may have {units.count(limit)}: {names}",
            "--costs measured",
            "leave it out and FLOP are taken, give --costs F,I,W, or measure on a machine with GPUs",
        )


def _tokens(parts: Iterable[Decoder], recipe: Recipe, device: torch.device) -> int:
    tokens = recipe.train.seq_len
    while tokens > 32 and max(flops.forward_flops(part, tokens) for part in parts) > FLOP[device.type]:
        tokens //= 2
    return tokens


def _timed(part: Decoder, recipe: Recipe, tokens: int, device: torch.device) -> Cost:
    part.to_empty(device=device)
    fill(part, recipe.seed)
    zeros = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    places = torch.arange(tokens, device=device)[None]
    dtype = DTYPES[recipe.precision.compute]
    x = zeros if part.embed is not None else torch.randn(1, tokens, recipe.model.hidden, device=device, dtype=dtype)
    x.requires_grad_(x.is_floating_point())
    weights = [weight for weight in part.parameters() if weight.requires_grad]
    ahead = Batch(zeros, zeros, places, zeros, zeros[:, 0]).look_ahead(part.ahead).ahead
    forward, inputs, whole = [], [], []
    for _ in range(REPEATS):
        tables = torch.promote_types(dtype, torch.float32)
        seq = Sequence(places, zeros, zeros[:, 0], dtype=tables, ahead=ahead)
        start = _now(device)
        out = part(x, seq, zeros)
        loss = out if isinstance(out, Tensor) else out["total"]
        grad = torch.ones_like(loss)
        forward.append(_now(device) - start)
        inputs.append(_gradient(loss, [x], grad, device) if x.requires_grad else 0.0)
        whole.append(_gradient(loss, [*weights, *([x] if x.requires_grad else [])], grad, device))
    part.to_empty(device="meta")
    return Cost(min(forward), min(inputs), max(0.0, min(whole) - min(inputs)))


def _gradient(loss: Tensor, of: list[Tensor], grad: Tensor, device: torch.device) -> float:
    start = _now(device)
    torch.autograd.grad(loss, of, grad, retain_graph=True, allow_unused=True)
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _sum(costs: list[Cost]) -> Cost:
    return Cost(
        sum(cost.forward for cost in costs),
        sum(cost.input_grad for cost in costs),
        sum(cost.weight_grad for cost in costs),
    )
