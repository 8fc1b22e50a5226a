"""This process among the others: rank, device, process group, and decisions that all ranks share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from shardforge.core.errors import ForgeError, LaunchError
from shardforge.core.layout import Layout

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)


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
        answer: list[tuple[T | None, ForgeError | None]] = [(None, None)]
        if self.first:
            try:
                answer = [(work(), None)]
            except ForgeError as error:
                answer = [(None, error)]
        if self.control is not None:
            dist.broadcast_object_list(answer, src=0, group=self.control)
        result, error = answer[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def agree(self, work: Callable[[], T]) -> T:
        """The result of `work` on each rank; when it fails anywhere, the error of the lowest failing rank on all."""
        result, error = None, None
        try:
            result = work()
        except ForgeError as failure:
            error = failure
        if self.control is not None:
            errors: list[ForgeError | None] = [None] * self.size
            dist.all_gather_object(errors, error, group=self.control)
            error = next((each for each in errors if each is not None), None)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


def distributed() -> bool:
    """Whether a launcher (torchrun, or this program's own) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def cores() -> int:
    """CPU cores that this process may use; a scheduler gives a job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join(layout: Layout) -> World:
    """Join the job that the environment describes, or a world of one. The caller destroys the process group."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if distributed() else 1
    rank = int(os.environ["RANK"]) if distributed() else 0
    if size != layout.world_size:
        shards, left = divmod(size, layout.tp * layout.dp_replicate)
        example = "" if left else f", for example --set parallel.dp_shard={shards}"
        raise LaunchError(
            f"the layout {layout} needs {layout.world_size} processes and {size} were started",
            "parallel",
            f"start {layout.world_size}, or choose degrees whose product is {size}{example}",
        )
    here = int(os.environ.get("LOCAL_RANK", "0"))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    if torch.cuda.is_available():
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(max(1, cores() // beside))
    store = None if distributed() else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None
    return World(rank, size, device, control)
