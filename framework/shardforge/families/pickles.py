"""Pickles of other programs, read without running anything of them.

A pickle names functions and classes to call. Here a fixed list of harmless ones is known, those that make tensors,
sizes and plain containers; every other name becomes an `Inert`, which takes whatever it is given and does nothing. So
settings of a class that is not installed do no harm, and neither does a pickle that was made to.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from shardforge.core.errors import CheckpointError


@dataclass
class Fragment:
    """Where DeepSpeed keeps a part of a weight in a flat tensor."""

    numel: int = 0
    start: int = 0


def _plain(made: Callable[..., Any], kind: Any, args: Any, state: Any) -> Any:
    """A tensor without the class and the attributes that it was saved with."""
    return made(*args)


HARMLESS: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # as older protocols name it
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _plain,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): Fragment,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in metadata.__all__},
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
}
CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


class Inert:
    """Stands for an object of a class that is not known here."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        constant = getattr(torch, name, None) if module == "torch" else None
        if isinstance(constant, CONSTANTS):
            return constant
        return HARMLESS.get((module, name), Inert)


def read_pickle(path: Path) -> Any:
    """A plain pickle. CheckpointError when it is none."""
    with path.open("rb") as file:
        return _tried(lambda: Unpickler(file).load(), path)


def read_saved(path: Path) -> Any:
    """What torch.save wrote, tensors on the CPU mapped from the file."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            "this is not a file of torch.save, or one in its format before torch 1.6",
            path,
            "load and save it again with a newer torch where you trust it",
        )
    return _tried(lambda: _load(path, mmap=True), path)


def read_stream(file: IO[bytes], path: Path) -> Any:
    """The same from an open file, which `path` names in errors."""
    return _tried(lambda: _load(file), path)


def load(file: IO[bytes], **how: Any) -> Any:
    """What torch.load asks of a module of pickles, beside `Unpickler`."""
    return Unpickler(file, **how).load()


def _load(file: Any, **how: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=sys.modules[__name__], **how)


def _tried(work: Any, path: Path) -> Any:
    try:
        return work()
    except Exception as cause:  # a damaged pickle raises anything
        raise CheckpointError(f"cannot be read: {type(cause).__name__}: {cause}", path, "copy it again") from cause
