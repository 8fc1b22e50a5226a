"""This process among the others: rank, device, process group, and decisions that all ranks share."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _set_pg_timeout

from shardforge.core.errors import ForgeError, LaunchError, LayoutError
from shardforge.core.layout import Layout

T = TypeVar("T")
JOINING_S = 600.0
"""Ranks start at different moments: images are pulled, packages imported. The first waits this long for the last."""
SHOWN = 16


class Unmet(LaunchError):
    """The ranks have not all come: a lost packet or a slow node, which another start may mend."""


class FailedThere(Exception):
    """What another rank met that is no ForgeError; `trace` is its traceback. Every rank raises the same."""

    def __init__(self, rank: int, trace: str):
        self.rank, self.trace = rank, trace
        super().__init__(rank, trace)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None  # gloo, for flags and small objects; None for one process

    @property
    def first(self) -> bool:
        return self.rank == 0

    def lead(self, work: Callable[[], T]) -> T:
        """The result of `work` on the first rank, on all ranks; its error too."""
        if self.control is None:
            return work()
        answer: list[tuple[T | None, Exception | None]] = [self._tried(work) if self.first else (None, None)]
        dist.broadcast_object_list(answer, src=0, group=self.control)
        result, error = answer[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def agree(self, work: Callable[[], T]) -> T:
        """The result of `work` on each rank; when it fails anywhere, the error of the lowest failing rank on all."""
        if self.control is None:
            return work()
        result, error = self._tried(work)
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, error, group=self.control)
        first = next((each for each in errors if each is not None), None)
        if first is not None:
            raise first
        return result  # type: ignore[return-value]

    def _tried(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """The result, or an error that can travel: what is no ForgeError may not be picklable."""
        try:
            return work(), None
        except ForgeError as error:
            return None, error
        except Exception:
            return None, FailedThere(self.rank, traceback.format_exc())


def distributed() -> bool:
    """Whether a launcher (torchrun, or this program's own) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def cores() -> int:
    """CPU cores that this process may use; a scheduler gives a job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join(layout: Layout, timeout_s: float = JOINING_S) -> World:
    """Join the job that the environment describes, or a world of one. The caller destroys the process group.

    A collective of the groups made here gives up some time after `timeout_s`, when the pulse has failed to (pulse.py).
    """
    size = _number("WORLD_SIZE", 1) if distributed() else 1
    rank = _number("RANK", 0) if distributed() else 0
    check_size(layout, size, rank)
    here = _number("LOCAL_RANK", 0)
    beside = _number("LOCAL_WORLD_SIZE", size)
    if torch.cuda.is_available():
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(max(1, cores() // beside))
    store = meet(layout, rank) if distributed() else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=later(timeout_s))
    control = dist.new_group(backend="gloo", timeout=later(timeout_s), group_desc="control") if size > 1 else None
    return World(rank, size, device, control)


def check_size(layout: Layout, size: int, rank: int) -> None:
    """LaunchError unless the layout is one of `size` ranks, of which `rank` is one."""
    if size != layout.world_size:
        raise LaunchError(
            f"the layout {layout} needs {layout.world_size} processes and {size} were started",
            "parallel",
            f"start {layout.world_size}, or choose degrees whose product is {size}{_example(layout, size)}",
        )
    if not 0 <= rank < size:
        raise LaunchError(
            f"this process is rank {rank} of {size}", "the environment variable RANK", f"ranks are 0 to {size - 1}"
        )


def _example(layout: Layout, size: int) -> str:
    """The degree of dp_shard that makes a layout of `size` ranks of this one, where there is one."""
    others = layout.world_size // layout.dp_shard
    shards, left = divmod(size, others)
    if left or shards < 1:
        return f"; the other axes alone take {others}" if others > 1 else ""
    try:
        replace(layout, dp_shard=shards)
    except LayoutError:
        return ""
    return f", for example --set parallel.dp_shard={shards}"


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise LaunchError(f"{text!r} is no number", f"the environment variable {name}", "start with torchrun or srun")
    return int(text)


def later(timeout_s: float) -> timedelta:
    """When a collective gives up by itself: some time after the pulse would have ended the run with a better error."""
    return timedelta(seconds=1.1 * timeout_s + 15)


def limit(timeout_s: float) -> None:
    """Let every group give up at that time; one that was given more patience than torch's own default keeps it."""
    for group in list(dist.distributed_c10d._world.pg_map):
        backends = [group._get_backend(device) for device in group._device_types]
        if all(each.options._timeout <= default_pg_timeout for each in backends):
            _set_pg_timeout(later(timeout_s), group)


def meet(layout: Layout, rank: int) -> dist.Store:
    """The job's store, once all ranks have come; LaunchError with the missing ones when they do not."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    size, patience = layout.world_size, timedelta(seconds=JOINING_S)
    fix = "look at what those ranks printed; all must be started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=patience)))
        store = dist.PrefixStore("shardforge/meet", store)
        store.set(str(rank), "")
        if store.add("come", 1) == size:
            store.set("all", "")
    except (dist.DistNetworkError, dist.DistStoreError) as cause:
        what = f"rank {rank} could not meet the others in {JOINING_S:.0f} s: {str(cause).splitlines()[0]}"
        raise Unmet(what, address, fix) from cause
    try:
        store.wait(["all"], patience)
    except (dist.DistNetworkError, dist.DistStoreError) as cause:
        missing = [each for each in range(size) if not store.check([str(each)])]
        told = ", ".join(map(str, missing[:SHOWN])) + (" and more" if len(missing) > SHOWN else "")
        what = f"{size - len(missing)} of {size} ranks came in {JOINING_S:.0f} s; missing: {told}"
        raise Unmet(what, address, fix) from cause
    return store
