"""The folder of a run's checkpoints: which steps are committed, how one becomes committed, which ones go.

checkpoints/
  step-00000200/              committed: manifest.json, then COMMITTED, written last
  step-00000300.tmp-0/        being written, or torn when no run is alive
  .trash-step-00000100/       being deleted

Listing imports no torch: what looks at a run from outside, between two starts of it, answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from shardforge.core.errors import CheckpointError
from shardforge.recipe.schema import CheckpointConfig

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
STEP = re.compile(r"step-(\d{8,})", re.ASCII)
TORN = re.compile(r"step-(\d{8,})(\.tmp-(\d+))?", re.ASCII)
DAMAGED = "`shardforge checkpoint audit` shows the extent; move the folder away to resume from an earlier step"


def name(step: int) -> str:
    return f"step-{step:08d}"


def committed(root: Path) -> list[int]:
    """Steps with a usable checkpoint, ascending."""
    found = (STEP.fullmatch(path.name) for path in (root.iterdir() if root.is_dir() else ()))
    return sorted(int(match[1]) for match in found if match and (root / match[0] / MARKER).is_file())


def torn(root: Path) -> list[Path]:
    """Folders of saves that never finished, sorted."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if TORN.fullmatch(path.name) and not (path / MARKER).is_file())


def open_attempt(root: Path, step: int) -> Path:
    """A new empty folder for writing `step`; never one that another attempt has used."""
    root.mkdir(parents=True, exist_ok=True)
    matches = (TORN.fullmatch(path.name) for path in root.iterdir())
    used = [int(match[3]) for match in matches if match and match[3] and int(match[1]) == step]
    path = root / f"{name(step)}.tmp-{max(used, default=-1) + 1}"
    path.mkdir()
    return path


def commit(attempt: Path, step: int, manifest: dict[str, Any]) -> Path:
    """Turn a completely written attempt into the checkpoint of `step`. Each instant before the last leaves it torn."""
    from shardforge.checkpoint import tensorfile

    content = json.dumps(manifest, indent=1).encode()
    tensorfile.write_whole(attempt / MANIFEST, content)
    final = attempt.with_name(name(step))
    if final.exists():
        discard(final)
    attempt.rename(final)
    tensorfile.settle_folder(final.parent)
    _mark(final, step, content)
    return final


def seal(folder: Path, step: int, manifest: dict[str, Any]) -> None:
    """Make a completely written folder the checkpoint of `step` where it lies, inside of what is not in place yet."""
    from shardforge.checkpoint import tensorfile

    content = json.dumps(manifest, indent=1).encode()
    tensorfile.write_whole(folder / MANIFEST, content)
    _mark(folder, step, content)


def _mark(folder: Path, step: int, manifest: bytes) -> None:
    from shardforge.checkpoint import tensorfile

    marker = {"step": step, "manifest": hashlib.sha256(manifest).hexdigest()}
    tensorfile.write_whole(folder / MARKER, json.dumps(marker).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint, which its marker vouches for."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        whole = marker["manifest"] == hashlib.sha256(content).hexdigest()
    except FileNotFoundError as cause:
        missing = Path(cause.filename).name
        raise CheckpointError(f"{missing} is missing: this is no committed checkpoint", folder, DAMAGED) from cause
    except (OSError, ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"the manifest cannot be read: {cause}", folder / MANIFEST, DAMAGED) from cause
    if not whole:
        raise CheckpointError("the manifest is not the one that was committed", folder / MANIFEST, DAMAGED)
    return manifest


def clear(root: Path, step: int, attempt: Path) -> None:
    """Remove what a failed save left behind, as far as the disk allows; a committed step stays."""
    for path in (attempt, root / name(step)):
        if path.is_dir() and not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)


def retire(root: Path, cfg: CheckpointConfig) -> list[Path]:
    """Delete what `cfg` does not keep, and the remains of torn saves; the folders that went come back.

    Call it right after a commit, with no save in progress.
    """
    steps = committed(root)
    kept = set(steps[-cfg.keep_last :])
    if cfg.keep_every is not None:
        kept |= {step for step in steps if step % cfg.keep_every == 0}
    gone = [root / name(step) for step in steps if step not in kept] + torn(root)
    for path in gone:
        discard(path)
    for trash in root.glob(".trash-*"):  # of a run that was killed while it deleted
        shutil.rmtree(trash)
    return gone


def discard(path: Path) -> None:
    """Delete a folder; half deleted it does not look like a checkpoint."""
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(path, trash)
    shutil.rmtree(trash)
