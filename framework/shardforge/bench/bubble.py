"""The bubble of each schedule as it runs on gloo, beside the one that its order of actions promises.

Stages of known duration: their forward pass, the gradient of their input and that of their weight each sleep, so many
ranks share few cores without disturbing each other. What is real is the rest: our pipeline, torch's schedule, and every
message. A rank's bubble is the share of a step in which it does not sleep.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from shardforge.core.errors import LayoutError
from shardforge.parallel import stages as cutting
from shardforge.parallel.pipeline import Pipeline
from shardforge.parallel.pool import Pool
from shardforge.parallel.stages import ORDERS, Work
from shardforge.plan.formula import bubble_formula
from shardforge.plan.simulate import Cost, simulate

WIDTH = 64


@dataclass(frozen=True)
class Bubble:
    """Shares of a step in which a rank waits, the mean over ranks."""

    schedule: str
    measured: float
    simulated: float
    formula: float | None


class _Input(Function):
    @staticmethod
    def forward(ctx, x, cost):
        ctx.cost = cost
        time.sleep(cost.forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.cost.input_grad)
        return grad, None


class _Weight(Function):
    @staticmethod
    def forward(ctx, weight, cost):
        ctx.cost = cost
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.cost.weight_grad)
        return grad, None


class Sleeper(nn.Module):
    def __init__(self, cost: Cost):
        super().__init__()
        self.weight, self.cost = nn.Parameter(torch.ones(WIDTH)), cost

    def forward(self, x: Tensor) -> Tensor:
        return _Input.apply(x, self.cost) * _Weight.apply(self.weight, self.cost)


def measure(schedule: str, micro_batches: int, cost: Cost, steps: int) -> float:
    """On each rank of a pipeline: this rank's bubble, the median over steps after an untimed one."""
    pp, rank = dist.get_world_size(), dist.get_rank()
    count = pp * ORDERS[schedule].stages
    cut = cutting.cut(schedule, pp, None, Work(0.0, (1.0,) * count, 0.0))
    parts = {stage: Sleeper(cost) for stage in cut.held(rank)}
    pipeline = Pipeline(parts, cut, dist.group.WORLD, torch.device("cpu"))
    stream = torch.empty(1, WIDTH, device="meta")

    def work(part: nn.Module, x: Tensor | None, micro: int) -> Tensor:
        y = part(torch.ones(1, WIDTH, requires_grad=True) if x is None else x)
        return y.sum() if part is parts.get(count - 1) else y

    busy, found = cost.total * micro_batches * len(parts), []
    for _ in range(steps + 1):
        dist.barrier()
        begun = time.perf_counter()
        pipeline.train(work, micro_batches, stream)
        dist.barrier()
        found.append(1 - busy / (time.perf_counter() - begun))
    return statistics.median(found[1:])


def run(
    pp: int, micro_batches: int, cost: Cost, tell: Callable[[str], None], schedules: tuple[str, ...] = tuple(ORDERS)
) -> list[Bubble]:
    """Every schedule over `pp` local ranks; `cost` in seconds. LayoutError where one cannot be run."""
    if pp < 1:
        raise LayoutError(f"a pipeline of {pp} ranks", "--pp", "give at least 2")
    for name in schedules:
        cutting.check_micro_batches(name, pp, micro_batches, micro_batches)
    out = []
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(pp, Path(folder), timeout_s=600)
        try:
            for name in schedules:
                ranks = pool.run(measure, name, micro_batches, cost, 3)
                chunks = ORDERS[name].stages
                cut = cutting.cut(name, pp, None, Work(0.0, (1.0,) * (pp * chunks), 0.0))
                promised = simulate(name, cut.ranks, micro_batches, [cost] * len(cut)).bubble
                formula = bubble_formula(name, pp, micro_batches, chunks, cost)
                out.append(Bubble(name, statistics.mean(ranks), promised, formula))
                said = "none" if formula is None else f"{formula:.4f}"
                tell(f"{name}: measured {out[-1].measured:.4f}, simulated {promised:.4f}, formula {said}")
        finally:
            pool.stop()
    return out
