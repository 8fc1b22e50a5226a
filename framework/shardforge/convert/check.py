"""Is a converted folder still what its certificate says? Files, numbers, and on request the proof once more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from shardforge.checkpoint import tensorfile
from shardforge.convert import certificate
from shardforge.convert.proof import How, lines, prove
from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.core.units import bytes_
from shardforge.core.workers import cores
from shardforge.families.open import open_source
from shardforge.families.section import apart
from shardforge.families.source import Source
from shardforge.families.turned import turned

AGAIN = "convert again"


@dataclass(frozen=True)
class Checked:
    files: int
    bytes: int
    weights: int  # that read back as the numbers that the source had, those of the optimizer included
    notes: tuple[str, ...]  # what was not looked at, and what was added since
    proof: Mapping[str, Any]  # as `Proof.plain` gives it; of the certificate unless it was asked for anew
    layers: bool = False  # say those of the proof too

    def __str__(self) -> str:
        first = (
            f"as certified: {self.files} files, {bytes_(self.bytes)}; {self.weights} tensors read back as the source's"
        )
        return "\n  ".join([first, *self.notes, *lines(self.proof, layers=self.layers)])


def check(folder: Path, *, proof: How | None = None, bisect: bool = False, config: Path | None = None) -> Checked:
    """Hash every file and every weight of `folder` again; with `proof` also prove it again, for which the source must
    still lie where it was. `bisect` is as for `convert.proof.prove`; `config` as for `families.open.open_source` of the
    source, and that of the conversion unless it is given.

    CheckpointError when there is no certificate; Problems with everything that is not as it says.
    """
    told = certificate.read(folder)
    try:
        problems, notes = [*_files(folder, told)], [*_added(folder, told)]
        problems += (found := _Weights(folder, told)).problems
        notes += found.notes
        size = sum(int(file["bytes"]) for file in told["target"]["files"].values())
        counts = len(told["target"]["files"]), size, found.equal
        paths = Path(told["source"]["path"]), folder / told["target"]["opens"]
        proved, known = told["proof"], told["source"].get("config")
        asked = {"cast": certificate.cast(told), "kinds": certificate.kinds(told)}
        opener = partial(open_source, config=config or (Path(known) if known else None))
    except (KeyError, TypeError, AttributeError, ValueError) as cause:
        what = f"the certificate says nothing that can be checked: {type(cause).__name__}: {cause}"
        raise CheckpointError(what, folder / certificate.NAME, AGAIN) from cause
    if proof is not None and not problems:
        try:
            proved = prove(*paths, how=proof, bisect=bisect, opener=opener, **asked).plain()
        except ForgeError as cause:
            problems.append(cause)
    if problems:
        raise Problems(problems, str(folder))
    return Checked(*counts, tuple(notes), proved, bisect)


def _files(folder: Path, told: Mapping[str, Any]) -> Iterator[ForgeError]:
    with ThreadPoolExecutor(cores(), "convert-check") as pool:
        files = told["target"]["files"].items()
        found = pool.map(lambda file: _changed(folder, *file), files)
        yield from (
            CheckpointError(what, folder / name, AGAIN) for (name, _), what in zip(files, found, strict=True) if what
        )


def _changed(folder: Path, name: str, file: Mapping[str, Any]) -> str:
    """What is wrong with a file of the certificate, "" for nothing."""
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return "the certificate names a file outside of the folder"
    if not path.is_file():
        return "the file is gone"
    if (size := path.stat().st_size) != file["bytes"]:
        return f"the file has {size} bytes, {file['bytes']} were written"
    if tensorfile.as_written(path, file["sha256"]):
        return ""
    return f"the file has not the SHA-256 of what was written, {file['sha256']}"


def _added(folder: Path, told: Mapping[str, Any]) -> Iterator[str]:
    known = {certificate.NAME, *told["target"]["files"]}
    if more := sorted(certificate.files(folder).keys() - known):
        some = ", ".join(more[:4])
        yield f"added since: {some}" + (f" and {len(more) - 4} more" if len(more) > 4 else "")


class _Weights:
    """The numbers of a folder, read as anybody would read them, beside the hashes of what was read of the source."""

    def __init__(self, folder: Path, told: Mapping[str, Any]):
        self.problems: list[ForgeError] = []
        self.notes: list[str] = []
        self.equal = 0
        try:
            source = turned(open_source(folder / told["target"]["opens"]), told["model"])
        except ForgeError as cause:
            self.problems.append(cause)
            return
        for field, there, here in apart(told["model"], source.model):
            what = f"{field} is {here!r} here and {there!r} in the certificate"
            self.problems.append(CheckpointError(what, source.path, AGAIN))
        self._compare(source, told)

    def _compare(self, source: Source, told: Mapping[str, Any]) -> None:
        rounded = {label for tensor in told["tensors"] if _rounded(tensor, told) for label in tensor["ours"]}
        unread = 0
        for label, weight in told["weights"].items():
            if label in rounded:
                continue
            try:
                numbers = _read(source, label)
            except ForgeError as cause:
                self.problems.append(cause)
                continue
            if numbers is None:
                unread += 1
            elif _hash(numbers.contiguous()) == weight["sha256"]:
                self.equal += 1
            else:
                what = f"{label} is not what was read of the source"
                self.problems.append(CheckpointError(what, source.path, AGAIN))
        if rounded:
            self.notes.append(
                f"{len(rounded)} weights were cast: their files alone were compared; --proof compares them"
            )
        if unread:
            self.notes.append(f"{unread} tensors of the optimizer are not read back: their files alone were compared")


def _rounded(tensor: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether a tensor has other numbers than the weights that it was made of."""
    if tensor["cast"]:
        return True
    first = tensor["ours"][0]
    return first.startswith("optim.") and not tensor["form"] and tensor["sha256"] != told["weights"][first]["sha256"]


def _read(source: Source, label: str) -> Tensor | None:
    """The numbers under a label of the certificate; None for what this source does not read of an optimizer."""
    part, _, name = label.partition(".")
    if part == "model":
        if name not in source.names:
            raise CheckpointError(f"{name} is not here", source.path, AGAIN)
        return source.read(name)
    name, _, kind = name.rpartition(".")
    return source.read_moment(kind, name) if kind in (*source.moments, *source.counts) else None


def _hash(numbers: Tensor) -> str:
    return hashlib.sha256(tensorfile.raw(numbers)).hexdigest()
