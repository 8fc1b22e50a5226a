"""Pickles of other programs, read without running anything of them.

A pickle names functions and classes to call. Here a fixed list of harmless ones is known, those that make tensors,
sizes and plain containers; every other name becomes an `Inert`, which takes whatever it is given and does nothing. So
settings of a class that is not installed do no harm, and neither does a pickle that was made to. A pickle may also set
attributes of what it has named: it gets classes and functions of its own, and those of the process stay as they are.
Programs of TorchScript, which torch.load would run, are refused.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from shardforge.core.errors import CheckpointError, ForgeError

AGAIN = "copy it again from where it was saved"
SHOWN = 200
"""Characters of a foreign error."""


@dataclass
class Fragment:
    """Where DeepSpeed keeps a part of a weight in a flat tensor."""

    numel: int = 0
    start: int = 0


class Properties(metadata.TensorProperties):
    """What torch.distributed keeps of a tensor: its type; the rest is of no use without the tensor."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


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
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): Properties,
}
CLOSED = (set, collections.OrderedDict, torch.Size)
"""Classes whose attributes nobody can set."""
CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
"""Their objects have no attributes that could be set either."""


class Inert:
    """Stands for an object of a class that is not known here."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __reduce__(self) -> Any:
        return Inert, ()

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
        return _own(HARMLESS.get((module, name), Inert))


def _own(known: Any) -> Any:
    """A class or function that is this pickle's alone: its BUILD sets attributes of whatever it names."""
    if known in CLOSED:
        return known
    return type(known.__name__, (known,), {}) if isinstance(known, type) else partial(known)


@contextmanager
def distrusted(path: Path, told: str = "cannot be read") -> Iterator[None]:
    """Whatever goes wrong with content of others inside becomes a CheckpointError at `path`."""
    try:
        yield
    except ForgeError:
        raise
    except Exception as cause:  # damaged content raises anything
        what = f"{told}: {type(cause).__name__}: {str(cause)[:SHOWN]}"
        raise CheckpointError(what, path, AGAIN) from cause


def read_pickle(path: Path) -> Any:
    """A plain pickle. CheckpointError when it is none."""
    _regular(path)
    with distrusted(path), path.open("rb") as file:
        return Unpickler(file).load()


def read_saved(path: Path) -> Any:
    """What torch.save wrote, tensors on the CPU mapped from the file. CheckpointError for anything else."""
    _regular(path)
    with distrusted(path):
        if not zipfile.is_zipfile(path):
            raise _other(path)
        with path.open("rb") as file:
            _checked(file, path)
        return _load(path, mmap=True)


def read_stream(file: IO[bytes], path: Path) -> Any:
    """The same from an open file that begins there, which `path` names in errors."""
    with distrusted(path):
        _checked(file, path)
        return _load(file)


def load(file: IO[bytes], **how: Any) -> Any:
    """What torch.load asks of a module of pickles, beside `Unpickler`."""
    return Unpickler(file, **how).load()


def _regular(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError("this is no regular file" if path.exists() else "this file is missing", path, AGAIN)


def _checked(file: IO[bytes], path: Path) -> None:
    """CheckpointError unless torch.load would take an open file for a pickle in a zip file, as it decides itself."""
    if not torch.serialization._is_zipfile(file):
        raise _other(path)
    with torch.serialization._open_zipfile_reader(file) as archive:
        if torch.serialization._is_torchscript_zip(archive):
            what = "this is a program (TorchScript), and reading it would run it"
            fix = "where you trust it: torch.save the state_dict of torch.jit.load of it"
            raise CheckpointError(what, path, fix)
    file.seek(0)


def _other(path: Path) -> CheckpointError:
    return CheckpointError(
        "this is not a file of torch.save, or one in its format before torch 1.6",
        path,
        "load and save it again with a newer torch where you trust it",
    )


def _load(file: Any, **how: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=sys.modules[__name__], **how)
