"""What an observer sees. It reads reports; it cannot change the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shardforge.core import units
from shardforge.observe.experts import ExpertUse


@dataclass(frozen=True)
class Slow:
    """A rank that holds the others up."""

    rank: int
    place: str  # "dp1 tp0"
    node: str
    measure: str  # "work" and "data": seconds of a step; "device": FLOP/s in a plain matmul
    value: float
    usual: float  # of the other ranks

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.place}) on {self.node}"
        if self.measure == "device":
            return f"{who}: its device reaches {units.count(self.value)} FLOP/s, others {units.count(self.usual)}"
        what = {"work": "of own work", "data": "of waiting for data"}[self.measure]
        return f"{who}: {units.seconds(self.value)} {what} a step, others {units.seconds(self.usual)}"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished step, equal on every rank but for the times and the memory, which are of the reporting rank."""

    step: int  # steps finished, this one included
    steps: int  # steps of the whole run
    loss: float  # nats per scored token, over the whole batch
    terms: Mapping[str, float] = field(default_factory=dict)  # parts of the objective beside the loss (z_loss)
    experts: Mapping[int, ExpertUse] = field(default_factory=dict)  # by layer, of those that have experts
    grad_norm: float = 0.0  # before clipping
    lr: float = 0.0
    tokens: int = 0  # scored and unscored tokens of this step, over all ranks
    tokens_seen: int = 0  # tokens since step 0
    seconds: float = 0.0  # wall time of this step
    data_seconds: float = 0.0  # of these, waiting for the batch
    save_seconds: float = 0.0  # of these, standing still for a checkpoint
    model_flops: float = 0.0  # FLOP of forward and backward of the model, over all ranks, without recompute
    peak_flops: float = 0.0  # FLOP/s that all devices together reach in plain matmul; 0 when unknown
    memory_bytes: int = 0  # device memory, or resident memory on CPU
    slow: tuple[Slow, ...] = ()  # in some steps: ranks that are slower than the others


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """A held-out evaluation after `step` steps."""

    step: int
    loss: float  # nats per scored token
    tokens: int  # scored tokens
    similarity: Mapping[int, float] = field(default_factory=dict)  # by layer: mean cosine between two experts' weights


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known before the first step."""

    name: str
    path: Path  # the run directory
    layout: str  # "dp2-tp2"
    world_size: int
    weights: int  # trained numbers of the whole model
    steps: int
    first_step: int  # > 0 when resumed
    recipe: Mapping[str, Any]  # resolved recipe as plain data
    unigram_entropy: float | None = None  # nats per held-out token for a model that knows only token frequencies
    attempt: Mapping[str, Any] = field(default_factory=dict)  # start, job, restart, nodes and reason, where known


class Observer(Protocol):
    """Lives on the first rank only. Each call must return quickly."""

    def on_start(self, info: RunInfo) -> None: ...

    def on_step(self, report: StepReport) -> None: ...

    def on_eval(self, report: EvalReport) -> None: ...

    def on_checkpoint(self, step: int, path: Path) -> None: ...

    def on_end(self, verdict: str) -> None:
        """verdict: "finished", "stopped" or "failed"."""
        ...
