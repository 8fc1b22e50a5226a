"""`shardforge checkpoint list|audit|show`: what a run has saved, and whether it is sound."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from shardforge.core.errors import CheckpointError
from shardforge.core.rundir import RunDir
from shardforge.core.units import bytes_, count

HELP = "list, audit and show what a run has saved"
UNSOUND = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = actions.add_parser("list", help="the checkpoints of a run, and the remains of saves that never finished")
    one.add_argument("path", metavar="RUN_DIR", type=Path)
    one = actions.add_parser("audit", help="read every byte: hashes, sizes, tensors, non-finite numbers; exit code 1")
    one.add_argument("path", metavar="PATH", type=Path, help="a run directory, or one step's folder")
    one = actions.add_parser("show", help="the tensors of a checkpoint: shape, type, size")
    one.add_argument("path", metavar="PATH", type=Path, help="a run directory (its newest step), or one step's folder")


def run(args: argparse.Namespace) -> int:
    return {"list": list_, "audit": audit, "show": show}[args.action](args.path)


def list_(path: Path) -> int:
    from shardforge.checkpoint import folders

    root = _root(path)
    print(f"{'step':>10}  {'saved':<19}  {'size':>10}  files")
    for step in folders.committed(root):
        folder = root / folders.name(step)
        saved = datetime.fromtimestamp((folder / folders.MARKER).stat().st_mtime)
        files = folders.read_manifest(folder)["files"]
        size = sum(record["bytes"] for record in files)
        print(f"{step:>10}  {saved:%Y-%m-%d %H:%M:%S}  {bytes_(size):>10}  {len(files)}")
    for folder in folders.torn(root):
        print(f"{'torn':>10}  {folder.name}: being written, or the rest of a save that never finished")
    return 0


def audit(path: Path) -> int:
    from shardforge.checkpoint import audit

    problems = 0
    for folder in _steps(path):
        report = audit.audit(folder)
        verdict = f"{len(report.problems)} problems" if report.problems else "sound"
        print(f"{folder}: {verdict}; {report.tensors} tensors, {report.files} files, {bytes_(report.bytes)}")
        for problem in report.problems:
            print(f"    {problem}")
        problems += len(report.problems)
    return UNSOUND if problems else 0


def show(path: Path) -> int:
    from shardforge.checkpoint import folders, index

    *_, folder = _steps(path)
    manifest, entries = folders.read_manifest(folder), index.read(folder)
    print(f"step {manifest['step']} in {folder}")
    width = max(map(len, entries), default=0)
    for name, entry in entries.items():
        shape = str(list(entry.shape))
        print(f"{name:<{width}}  {shape:<16}  {entry.dtype:<13}  {bytes_(entry.bytes):>10}  {len(entry.chunks)} pieces")
    numbers = sum(weight.numbers for name, weight in entries.items() if name.startswith("model."))
    size = sum(entry.bytes for entry in entries.values())
    print(f"{len(entries)} tensors, {bytes_(size)}; the model has {count(numbers)} numbers")
    return 0


def _root(path: Path) -> Path:
    """The folder of checkpoints that a run directory, or that folder itself, names."""
    root = RunDir(path).checkpoints
    if root.is_dir():
        return root
    if path.is_dir():
        return path
    raise CheckpointError("no such folder", path, "give a run directory or one of its step folders")


def _steps(path: Path) -> Iterator[Path]:
    from shardforge.checkpoint import folders

    if folders.TORN.fullmatch(path.resolve().name):
        yield path
        return
    root = _root(path)
    steps = folders.committed(root)
    if not steps:
        raise CheckpointError("no checkpoint was committed here", root, "give a run directory or a step folder")
    yield from (root / folders.name(step) for step in steps)
