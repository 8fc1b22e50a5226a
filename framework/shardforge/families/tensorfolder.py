"""A folder of safetensors files as Hugging Face writes them: one file, or several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shardforge.checkpoint import tensorfile, tensorheader
from shardforge.checkpoint.tensorfile import TYPES
from shardforge.core.errors import CheckpointError, DataError, ForgeError, Problems
from shardforge.families.source import Info

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
STORED = {theirs: ours for ours, (_, theirs) in TYPES.items()}
AGAIN = "download it again"
JSON_BYTES = 1 << 28
"""Of the longest JSON file that is read: indices of the largest models have 10 MB."""
SHOWN = 8


class TensorFolder:
    """See `families.linked.Tensors`. Headers are read at once, numbers when they are asked for.

    CheckpointError when there is no safetensors file; pickled weights are never opened, they could run code. Problems
    of everything in which headers, index and files contradict one another.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: dict[str, Info] = {}
        self.files: dict[str, Path] = {}  # of each tensor
        index = _index(path / INDEX) if (path / INDEX).is_file() else {}
        problems: list[ForgeError] = []
        for file in listed(path, index):
            try:
                self._enter(file, problems)
            except ForgeError as error:
                problems.append(error)
        if not problems:
            problems += self._unlike(index)
        if problems:
            raise Problems(problems, f"the weights in {path}")

    def read(self, name: str) -> Tensor:
        with tensorfile.opened(self.files[name]) as file:
            return file.get_tensor(name)

    def _enter(self, file: Path, problems: list[ForgeError]) -> None:
        for name, slot in tensorheader.header(file).items():
            dtype = STORED.get(slot.dtype)
            if dtype is None:
                problems.append(CheckpointError(f"{name} has the type {slot.dtype}", file, "convert it"))
            elif name in self.names:
                what = f"{name} is in {self.files[name].name} too"
                problems.append(CheckpointError(what, file, "remove the file that the index does not name"))
            else:
                self.names[name], self.files[name] = Info(slot.shape, dtype), file

    def _unlike(self, index: Mapping[str, str]) -> list[ForgeError]:
        """Tensors that do not lie where the index says, all in one."""
        if not self.names:
            return [CheckpointError("its files hold no tensor at all", self.path, AGAIN)]
        found = {name: file.name for name, file in self.files.items()}
        wrong = {name: file for name, file in index.items() if found.get(name) != file}
        lies = [f"{name} is in {file}, it is in {found.get(name, 'none')}" for name, file in wrong.items()]
        if not lies:
            return []
        more = f" and {len(lies) - SHOWN} more" if len(lies) > SHOWN else ""
        return [CheckpointError(f"the index says {'; '.join(lies[:SHOWN])}{more}", self.path / INDEX, AGAIN)]


def listed(path: Path, index: Mapping[str, str]) -> list[Path]:
    """The files that hold the weights of a folder; of an index, all that it names. CheckpointError for one that is
    missing, or lies elsewhere."""
    if index:
        named = sorted(set(index.values()))
        if odd := [name for name in named if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CheckpointError(f"{odd[0]!r} is not a file of this folder", path / INDEX, AGAIN)
        if missing := [name for name in named if not (path / name).is_file()]:
            what = f"{len(missing)} of {len(named)} files of the index are missing: {', '.join(missing[:8])}"
            raise CheckpointError(what, path, "download them")
        files = [path / name for name in named]
    else:
        files = [path / WHOLE] if (path / WHOLE).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise _absent(path)
    for file in files:
        if out := tensorheader.leads_out(file, path):
            raise CheckpointError(f"it is a link out of its folder, to {out}", file, "put the file itself there")
    return files


def _index(path: Path) -> dict[str, str]:
    """Tensor -> file, as the index says."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError("the index cannot be read: it has no table weight_map of tensors and files", path, AGAIN)
    return table


def _absent(path: Path) -> CheckpointError:
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if not pickled:
        return CheckpointError("there is no *.safetensors file", path, "name a folder with model.safetensors")
    return refused(path, pickled[0])


def refused(path: Path, file: str) -> CheckpointError:
    """The reason why a pickle of Hugging Face is not opened."""
    return CheckpointError(
        f"the weights are pickled ({file}), and a pickle can run any code when it is read",
        path,
        "if you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) in "
        "transformers writes safetensors",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping in which no name stands twice. DataError when it is none."""
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise DataError(f"{size} bytes are more than the {JSON_BYTES} that settings may have", path, AGAIN)
        return tensorheader.mapping(path.read_bytes(), path)
    except (OSError, CheckpointError) as cause:
        told = cause.what if isinstance(cause, CheckpointError) else f"cannot be read: {cause}"
        raise DataError(told, path, AGAIN) from cause
