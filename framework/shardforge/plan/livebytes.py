"""Bytes of all tensors alive, followed operation by operation."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts storages while it is entered: `now`, and the largest so far in `peak`; real tensors or fake ones.

    A storage counts from the operation that made it until nothing refers to it, once, whatever views there are. What
    existed before is counted after `add`. Rounding and caches of an allocator, buffers of collectives and workspaces
    of kernels are not tensors and do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # address of a storage -> bytes
        self._alive: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor made elsewhere."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._alive[key] = weakref.ref(storage, partial(self._gone, key))
            self._sizes[key] = 0
            self._resized(key, storage.nbytes())

    def settled(self) -> int:
        """`now`, once cycles of objects that nothing refers to are gone."""
        gc.collect()
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor):
                self.add(each)
        return out

    def __enter__(self) -> LiveBytes:
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)  # FSDP2 frees and allocates gathered weights so, outside of any operation
            if storage._cdata in self._sizes:
                self._resized(storage._cdata, storage.nbytes())
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _resized(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, _: weakref.ref) -> None:
        self.now -= self._sizes.pop(key)
        del self._alive[key]
