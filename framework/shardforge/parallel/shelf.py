"""Where the activations of one block wait for its backward pass, and the lane on which they travel.

Storages travel, not tensors: what several operations keep, whole or in views, is copied once and comes back as views of
one storage. A shelf comes back as a whole when the backward pass of its block begins, or one block earlier.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter


class Parcel:
    """All bytes of one storage: `host` for good, `device` while it has not left and after it has come back."""

    def __init__(self, device: Tensor, host: Tensor):
        self.device: Tensor | None = device
        self.host = host


@dataclass(frozen=True)
class View:
    """What autograd holds in place of a tensor: where it stands in a parcel."""

    parcel: Parcel
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def open(self) -> Tensor:
        assert self.parcel.device is not None
        storage = self.parcel.device.untyped_storage()
        out = torch.empty(0, dtype=self.dtype, device=self.parcel.device.device)
        return out.set_(storage, self.offset, self.shape, self.stride)


class Lane:
    """Copies of the blocks of one model, in order. This one is for a CPU, where the device is the host."""

    device_type = "cpu"
    least_bytes = 0
    """Smaller storages stay: to start a copy takes longer than the copy."""

    def __init__(self) -> None:
        self.filling: Shelf | None = None  # of the block that runs
        self.latest: Shelf | None = None  # of the block that ran before

    def out(self, x: Tensor) -> Tensor:
        return x

    def back(self, x: Tensor) -> Tensor:
        return x

    def mark(self) -> Any:
        """A point behind all copies so far."""

    def wait(self, mark: Any) -> None:
        """The device goes on when the copies before `mark` are done."""


class CudaLane(Lane):
    """Copies beside the computation, on a stream of their own, through pinned memory.

    Memory of the device belongs to the stream that computes; the lane waits for it before it reads or writes there.
    """

    device_type = "cuda"
    least_bytes = 1 << 16

    def __init__(self) -> None:
        super().__init__()
        self.stream = torch.cuda.Stream()

    def out(self, x: Tensor) -> Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def back(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device="cuda")
        out.record_stream(self.stream)  # should nobody ever wait for it
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return out.copy_(x, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        return self.stream.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(mark)


def lane_of(device_type: str) -> Lane:
    return CudaLane() if device_type == "cuda" else Lane()


class Shelf:
    """The saved tensors of one run of one block. `before`: the shelf of the block before it, None for the first."""

    def __init__(self, lane: Lane, before: Shelf | None):
        self.lane, self.before = lane, before
        self.spared: set[int] = set()  # addresses of storages
        self.held: dict[tuple[int, int], Parcel] = {}  # by address and version, while the block runs
        self.parcels: WeakSet[Parcel] = WeakSet()  # those that autograd still needs
        self.copied: Any = None
        self.back = False

    def spare(self, weights: Iterable[Tensor]) -> None:
        """Leave these where they are: weights as they are gathered now, tables that all layers share."""
        for weight in weights:
            piece = weight._local_tensor if isinstance(weight, DTensor) else weight
            self.spared.add(piece.untyped_storage().data_ptr())

    def pack(self, x: Tensor) -> Tensor | View:
        if type(x) not in (Tensor, Parameter) or x.device.type != self.lane.device_type or x.numel() == 0:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() in self.spared or storage.nbytes() < self.lane.least_bytes:
            return x
        key = (storage.data_ptr(), x._version)
        if key not in self.held:
            whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
            self.held[key] = Parcel(whole, self.lane.out(whole))
            self.parcels.add(self.held[key])
        return View(self.held[key], x.dtype, x.shape, x.stride(), x.storage_offset())

    def unpack(self, saved: Tensor | View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.fetch()
        if self.before is not None:
            self.before.fetch()
        self.lane.wait(self.copied)
        return saved.open()

    def close(self) -> None:
        """The block has run. Its copies have until the end of the next block; those of the block before are due."""
        self.held.clear()
        self.copied = self.lane.mark()
        if self.lane.latest is not None:
            self.lane.latest.leave()
        self.lane.latest = self

    def leave(self) -> None:
        """Free the memory of the device once the copies are done, unless the backward pass has begun."""
        if not self.back:
            self.lane.wait(self.copied)
            for parcel in self.parcels:
                parcel.device = None

    def fetch(self) -> None:
        """Begin to copy back what has left."""
        if not self.back:
            self.back = True
            for parcel in self.parcels:
                if parcel.device is None:
                    parcel.device = self.lane.back(parcel.host)
            self.copied = self.lane.mark()
