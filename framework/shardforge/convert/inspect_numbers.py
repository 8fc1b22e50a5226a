"""The numbers of a checkpoint, one tensor at a time over all cores: norms, what is not finite, how two differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import inf, sqrt
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shardforge.convert.inspect import Opened, bytes_of, lines, opened
from shardforge.core.errors import CheckpointError, ForgeError
from shardforge.core.workers import Workers, cores
from shardforge.families.memory import free

BLOCK = 1 << 20  # numbers that are looked at together, in float64
JOB_BYTES = 1 << 26
ALONE_BYTES = 1 << 28
"""Below this one process is done before others have begun."""
PROCESS_BYTES, COPIES = 600 << 20, 4
"""Of memory that a process takes: torch and the blocks, and times its largest tensor, what it lies fused in included.
Measured with torch 2.13 on Linux, 2026-11."""
Found = TypeVar("Found")
again = lru_cache(maxsize=2)(opened)
"""In one process, for all of its jobs."""


@dataclass(frozen=True)
class Numbers:
    """Of one tensor. Norm, mean and the rest are of the numbers that are finite."""

    count: int
    norm: float
    mean: float
    largest: float  # absolute value
    zeros: int
    nan: int
    infinite: int

    @property
    def rms(self) -> float:
        finite = self.count - self.nan - self.infinite
        return self.norm / sqrt(finite) if finite else 0.0


@dataclass(frozen=True)
class Difference:
    """Of two tensors of one shape."""

    count: int
    unequal: int  # numbers; two that are not a number are equal
    largest: float  # absolute difference; infinite where only one side is finite
    relative: float  # norm of the difference over the norm of the first
    cosine: float  # 1.0 when both are zero


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, tensor by tensor."""

    missing: tuple[str, ...]  # in the second
    extra: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    types: Mapping[str, tuple[str, str]]
    tensors: Mapping[str, Difference]  # the largest difference first
    broken: Mapping[str, str]  # tensors that cannot be read, and why

    @property
    def same(self) -> bool:
        apart = self.missing or self.extra or self.shapes or self.types or self.broken
        return not apart and not any(each.unequal for each in self.tensors.values())


@dataclass(frozen=True)
class Job:
    """Tensors that one process looks at, of one checkpoint or of two."""

    names: tuple[str, ...]
    path: Path
    config: Path | None
    other: Path | None = None
    other_config: Path | None = None
    moments: bool = False


def numbers(
    path: Path, config: Path | None = None, *, moments: bool = False, processes: int | None = None
) -> tuple[dict[str, Numbers], dict[str, str]]:
    """The numbers of every tensor, and of those that cannot be read the reason. With `moments` of what the optimizer
    keeps too, "NAME exp_avg". `processes` is all cores unless given."""
    found = opened(path, config)
    sizes = {name: bytes_of(info) for name, info, _ in found.entries(moments)}
    jobs = [Job(names, path, config, moments=moments) for names in _cut(sizes)]
    return _sorted(_run(_measure, jobs, sizes, processes), sizes)


def compare(
    path: Path,
    other: Path,
    config: Path | None = None,
    other_config: Path | None = None,
    *,
    moments: bool = False,
    processes: int | None = None,
) -> Comparison:
    """The second against the first. CheckpointError when one has our names and the other those of its files."""
    one, two = opened(path, config), opened(other, other_config)
    if (one.source is None) != (two.source is None):
        raise CheckpointError(
            f"only {one.path if one.source else two.path} could be opened as a model, so their names are not alike",
            other,
            "`shardforge inspect` of the other says why",
        )
    left, right = ({name: info for name, info, _ in each.entries(moments)} for each in (one, two))
    common = [name for name in left if name in right]
    fitting = {name: bytes_of(left[name]) for name in common if left[name].shape == right[name].shape}
    jobs = [Job(names, path, config, other, other_config, moments) for names in _cut(fitting)]
    found, broken = _sorted(_run(_differ, jobs, fitting, processes), fitting)
    return Comparison(
        missing=tuple(name for name in left if name not in right),
        extra=tuple(name for name in right if name not in left),
        shapes={name: (left[name].shape, right[name].shape) for name in common if name not in fitting},
        types={name: (left[name].dtype, right[name].dtype) for name in common if left[name].dtype != right[name].dtype},
        tensors=dict(sorted(found.items(), key=lambda each: (-each[1].largest, -each[1].relative))),
        broken=broken,
    )


def measured(tensor: Tensor) -> Numbers:
    total = square = largest = 0.0
    zeros = nan = infinite = 0
    for block in _blocks(tensor):
        finite = torch.isfinite(block)
        if not bool(finite.all()):
            nan += int(torch.isnan(block).sum())
            infinite += int(torch.isinf(block).sum())
            block = block[finite]
        if block.numel():
            total += block.sum().item()
            square += block.dot(block).item()
            largest = max(largest, *(abs(each.item()) for each in block.aminmax()))
            zeros += block.numel() - int(block.count_nonzero())
    finite_count = tensor.numel() - nan - infinite
    return Numbers(
        tensor.numel(), sqrt(square), total / finite_count if finite_count else 0.0, largest, zeros, nan, infinite
    )


def apart(one: Tensor, other: Tensor) -> Difference:
    """How much the second differs from the first."""
    unequal, largest, sums = 0, 0.0, [0.0] * 4
    for a, b in zip(_blocks(one), _blocks(other), strict=True):
        same = (a == b) | (torch.isnan(a) & torch.isnan(b))
        unequal += int((~same).sum())
        finite = torch.isfinite(a) & torch.isfinite(b)
        if not bool((finite | same).all()):
            largest = inf
        if not bool(finite.all()):
            a, b = a[finite], b[finite]
        step = a - b
        largest = max(largest, step.abs().max().item() if step.numel() else 0.0)
        for place, (first, second) in enumerate(((step, step), (a, a), (b, b), (a, b))):
            sums[place] += first.dot(second).item()
    square, left, right, inner = sums
    both = sqrt(left) * sqrt(right)
    return Difference(
        count=one.numel(),
        unequal=unequal,
        largest=largest,
        relative=sqrt(square / left) if left else (inf if square else 0.0),
        cosine=max(-1.0, min(1.0, inner / both)) if both else float(left == right),
    )


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        yield flat[start : start + BLOCK].double()


def _cut(sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Neighbours for one job: what lies fused in a file is read there together."""
    names: list[str] = []
    waiting = 0
    for name, size in sizes.items():
        names.append(name)
        waiting += size
        if waiting >= JOB_BYTES:
            yield tuple(names)
            names, waiting = [], 0
    if names:
        yield tuple(names)


def _run(
    work: Callable[[Job], dict[str, Any]], jobs: Sequence[Job], sizes: Mapping[str, int], processes: int | None
) -> Iterator[dict[str, Any]]:
    """What each job finds, in any order. Without `processes` as many as have cores and memory."""
    again.cache_clear()
    if processes is None:
        one = PROCESS_BYTES + COPIES * max(sizes.values(), default=0)
        processes = min(cores(), max(1, free() // one)) if sum(sizes.values()) >= ALONE_BYTES else 1
    count = min(processes, max(1, len(jobs)))
    prepare = partial(torch.set_num_threads, 1) if count > 1 else None
    with Workers(count, "shardforge inspect", "--processes", prepare) as workers:
        yield from workers.run(work, jobs)


def _sorted(results: Iterator[dict[str, Any]], order: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, str]]:
    """What was found in the order of the checkpoint, and what could not be read."""
    every = {name: found for result in results for name, found in result.items()}
    known = [name for name in order if name in every]
    return (
        {name: every[name] for name in known if not isinstance(every[name], str)},
        {name: every[name] for name in known if isinstance(every[name], str)},
    )


def _measure(job: Job) -> dict[str, Numbers | str]:
    return _each(job, [again(job.path, job.config)], measured)


def _differ(job: Job) -> dict[str, Difference | str]:
    assert job.other is not None
    return _each(job, [again(job.path, job.config), again(job.other, job.other_config)], apart)


def _each(job: Job, sides: Sequence[Opened], look: Callable[..., Found]) -> dict[str, Found | str]:
    """What `look` finds in each tensor, or why it cannot be read; what the optimizer does not keep for a weight that
    was frozen is left out."""
    reads = [{name: read for name, _, read in side.entries(job.moments)} for side in sides]
    found: dict[str, Found | str] = {}
    for name in job.names:
        try:
            found[name] = look(*(read[name]() for read in reads))
        except ForgeError as error:
            found[name] = "; ".join(lines(error))
        except KeyError:
            if " " not in name:
                raise
    return found
