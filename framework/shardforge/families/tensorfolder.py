"""A folder of safetensors files as Hugging Face writes them: one file, or several with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import TYPES
from shardforge.core.errors import CheckpointError, DataError, ForgeError, Problems
from shardforge.families.source import Info

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
STORED = {theirs: ours for ours, (_, theirs) in TYPES.items()}


class TensorFolder:
    """See `families.linked.Tensors`. Headers are read at once, numbers when they are asked for.

    CheckpointError when there is no safetensors file; pickled weights are never opened, they could run code.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: dict[str, Info] = {}
        self._files: dict[str, Path] = {}
        problems: list[ForgeError] = []
        for file in self._list():
            try:
                self._enter(file, problems)
            except Exception as cause:
                problems.append(CheckpointError(f"cannot be read as safetensors: {cause}", file, "download it again"))
        if problems:
            raise Problems(problems, f"the weights in {path}")

    def read(self, name: str) -> Tensor:
        with tensorfile.opened(self._files[name]) as file:
            return file.get_tensor(name)

    def _list(self) -> list[Path]:
        """The files that hold the weights; of an index, all that it names."""
        if (self.path / INDEX).is_file():
            named = sorted(set(self._index().values()))
            if odd := [name for name in named if Path(name).name != name or not name.endswith(".safetensors")]:
                raise CheckpointError(
                    f"{odd[0]!r} is not a file of this folder", self.path / INDEX, "download it again"
                )
            if missing := [name for name in named if not (self.path / name).is_file()]:
                what = f"{len(missing)} of {len(named)} files of the index are missing: {', '.join(missing[:8])}"
                raise CheckpointError(what, self.path, "download them")
            return [self.path / name for name in named]
        found = [self.path / WHOLE] if (self.path / WHOLE).is_file() else sorted(self.path.glob("*.safetensors"))
        if not found:
            raise self._absent()
        return found

    def _index(self) -> dict[str, str]:
        try:
            table: Any = json.loads((self.path / INDEX).read_bytes())["weight_map"]
            return {str(name): str(file) for name, file in table.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            what = f"the index cannot be read: {type(cause).__name__}: {cause}"
            raise CheckpointError(what, self.path / INDEX, "download it again") from cause

    def _absent(self) -> CheckpointError:
        pickled = sorted(file.name for pattern in PICKLED for file in self.path.glob(pattern))
        if not pickled:
            return CheckpointError("there is no *.safetensors file", self.path, "name a folder with model.safetensors")
        return CheckpointError(
            f"the weights are pickled ({pickled[0]}), and a pickle can run any code when it is read",
            self.path,
            "if you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) in "
            "transformers writes safetensors",
        )

    def _enter(self, file: Path, problems: list[ForgeError]) -> None:
        with tensorfile.opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                header = opened.get_slice(name)
                dtype = STORED.get(header.get_dtype())
                if dtype is None:
                    problems.append(CheckpointError(f"{name} has the type {header.get_dtype()}", file, "convert it"))
                elif name in self.names:
                    what = f"{name} is in {self._files[name].name} too"
                    problems.append(CheckpointError(what, file, "remove the file that the index does not name"))
                else:
                    self.names[name], self._files[name] = Info(tuple(header.get_shape()), dtype), file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping. DataError when it is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as cause:
        raise DataError(f"cannot be read: {cause}", path, "download it again") from cause
    if not isinstance(found, dict):
        raise DataError(f"expected a mapping, got a {type(found).__name__}", path, "download it again")
    return found
