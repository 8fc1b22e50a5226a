"""What a run was made of: code, packages, data, seed, machine. One entry per start."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import shardforge
from shardforge.checkpoint.tensorfile import write_whole

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "triton", "flash-attn", "transformer-engine", "deepspeed")


def start(
    *,
    recipe_hash: str,
    data: str,
    seed: int,
    layout: str,
    first_step: int,
    device: str,
    weights: dict[str, Any] | None = None,
    attempt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One entry, plain data. `weights` says whose weights this start began with, None for its own; `attempt` which job
    and restart it is, and why."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "recipe_hash": recipe_hash,
        "data_fingerprint": data,
        "seed": seed,
        "layout": layout,
        "first_step": first_step,
        "weights": weights,
        "shardforge": shardforge.__version__,
        "code": code(Path(shardforge.__file__).parent),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "device": device,
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "attempt": attempt or {},
    }


def code(folder: Path) -> dict[str, str | None]:
    """Git commit of the source and a hash of what differs from it; both None outside a clone, the hash if nothing."""
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # not merely installed below some clone
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    changes = (_git(folder, "diff", "HEAD", "--", ".") or "") + _new(folder) if commit else ""
    dirty = hashlib.sha256(changes.encode()).hexdigest()[:16] if changes else None
    return {"commit": commit, "dirty": dirty}


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the JSON list in `path`, replacing the file at once."""
    entries = json.loads(path.read_text()) if path.exists() else []
    write_whole(path, json.dumps([*entries, entry], indent=1).encode() + b"\n")


def _new(folder: Path) -> str:
    """Names and contents of files that git does not know yet: a new kind is one."""
    names = (_git(folder, "ls-files", "-z", "--others", "--exclude-standard") or "").split("\0")
    files = [folder / name for name in names if name and (folder / name).is_file()]
    return "".join(f"\n{file.relative_to(folder)}\n{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
