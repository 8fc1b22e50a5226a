"""Conversions in a test, and what they leave."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from shardforge.convert.format import Options
from shardforge.convert.run import Converted, convert
from shardforge.families.open import open_source


def converted(source: Path, target: Path, to: str = "huggingface", proof: str = "none", **asked: Any) -> Converted:
    """In this process, unless `processes` says otherwise."""
    run = {name: asked.pop(name) for name in ("processes", "opener", "bisect") if name in asked}
    return convert(source, target, Options(to=to, **asked), proof=proof, **{"processes": 1} | run)


def contents(path: Path) -> dict[str, str]:
    """Hash of every file below a folder, but for the certificate, which names its place."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "conversion.json")
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    return {name: source.read(name) for name in source.names}
