"""A run's checkpoints: saved beside the training, committed by a marker written last, loaded into any layout.

    save, main thread         settle the save before -> first rank opens an attempt -> copy to CPU -> return
    save, background thread   all write their shards -> first rank: index, manifest, rename, marker -> retention

Every rank calls every method, in the same order. Each phase ends with all ranks knowing whether all have succeeded, so
an error on one is the same CheckpointError on all, and no rank waits for one that has given up.
"""

from __future__ import annotations

import functools
import json
import operator
import shutil
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from shardforge.checkpoint import audit, folders, index, tensorfile
from shardforge.checkpoint.crew import Crew, explained, lost
from shardforge.checkpoint.index import Entry
from shardforge.checkpoint.staging import StagedPlanner, Staging, check, live, whole_bytes
from shardforge.checkpoint.storage import ShardReader, ShardWriter
from shardforge.core.errors import CheckpointError
from shardforge.core.log import logger
from shardforge.core.units import bytes_
from shardforge.recipe.schema import CheckpointConfig

log = logger("checkpoint")

WRITER = "checkpoint-"
"""What the name of a background thread begins with; its step follows."""


@dataclass(frozen=True)
class _Saving:
    """One save on its way through the background thread."""

    step: int
    attempt: Path
    tensors: dict[str, Tensor]  # live: only their shapes and placements are read
    pieces: Mapping[str, Tensor] | Exception  # staged numbers, or why there are none
    extra: dict

    def staged(self) -> Mapping[str, Tensor]:
        if isinstance(self.pieces, Exception):
            raise self.pieces
        return self.pieces


class Store:
    """The checkpoints under `path`. `describe` is plain JSON that says what they are of: "model" is `state.table`.

    Creating and closing a store is collective. An error of a background save is raised by the next call.
    """

    def __init__(self, path: Path, cfg: CheckpointConfig, *, describe: dict, group: dist.ProcessGroup | None = None):
        self.path, self.cfg, self.describe = path, cfg, describe
        self._crew = Crew(group)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._named: set[Path] = set()
        if not self._crew.joined:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is no mistake

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: dict, *, wait: bool = False) -> float:
        """Save `tensors` (see `state.collect`) and `extra` (JSON) as of `step`; seconds that training stood still.

        Returns when the tensors are copied, so they may change at once; with `wait`, or unless cfg.asynchronous, when
        the checkpoint is committed, and then no copy is made. A step that is committed already is left as it is.
        """
        begun, standing = time.perf_counter(), wait or not self.cfg.asynchronous
        self._settle()
        self._crew.agree(lambda: check(tensors, extra), self.path)
        stages = dict(
            self._crew.gather((min(tensors, default=""), whole_bytes(tensors)), self.path)
        )  # ranks of a stage name the same
        attempt = self._crew.lead(lambda: self._open(step, sum(stages.values())), self.path)
        if attempt is None:
            return time.perf_counter() - begun
        try:
            pieces: Mapping[str, Tensor] | Exception = live(tensors) if standing else self._staging.copy(tensors)
        except Exception as cause:
            pieces = cause  # told to the others in the background, where they are
        saving = _Saving(step, self.path / attempt, dict(tensors), pieces, json.loads(json.dumps(extra)))
        self._thread = threading.Thread(target=self._finish, args=(saving,), name=f"{WRITER}{step}")
        self._thread.start()
        if standing:
            self._settle()
        return time.perf_counter() - begun

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> int:
        """Fill `tensors` in place from the checkpoint of `step`, whatever layout wrote it; the step comes back.

        A checkpoint of another model, or a damaged one, is a CheckpointError before any tensor is touched. Names are
        compared within each part that `tensors` asks for: without any `optim.` name only the model is loaded.
        """
        self._settle()
        folder = self.path / folders.name(step)
        entries = self._crew.agree(lambda: self._entries(folder), folder)
        elsewhere = self._asked(entries, tensors, folder)
        self._crew.agree(lambda: _same(index.differences(entries, tensors, elsewhere), folder), folder)
        reader = ShardReader(folder, entries)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=self._crew.group)
        except (CheckpointException, RuntimeError) as cause:
            raise _told(cause, folder) from cause
        self._crew.agree(lambda: _raise(reader.error), folder)
        return step

    def load_latest(self, tensors: Mapping[str, Tensor]) -> int | None:
        """Fill `tensors` from the newest committed checkpoint; its step, or None when there is none yet."""
        self._settle()
        steps = self._crew.lead(self.committed, self.path)
        return self.load(steps[-1], tensors) if steps else None

    def committed(self) -> list[int]:
        """Steps with a usable checkpoint, ascending, as this rank sees the folder; names torn ones once in the log."""
        alive = self._thread is not None and self._thread.is_alive()
        for path in folders.torn(self.path) if self._crew.rank == 0 and not alive else ():
            if path not in self._named:
                self._named.add(path)
                log.warning("%s is the rest of a save that never finished; it is ignored", path)
        return folders.committed(self.path)

    def extra(self, step: int) -> dict:
        """What `save` was given as `extra`."""
        return folders.read_manifest(self.path / folders.name(step))["extra"]

    def description(self, step: int) -> dict:
        """The `describe` of the run that saved this step."""
        return folders.read_manifest(self.path / folders.name(step))["describe"]

    def close(self) -> None:
        """Wait for the save in flight and raise its error, if any. The store cannot be used afterwards."""
        try:
            self._settle()
        finally:
            self._crew.close()

    def _open(self, step: int, needed: int) -> str | None:
        """First rank only: the folder to write into, or None when there is nothing to do."""
        final = self.path / folders.name(step)
        if step in self.committed():
            differing = audit.compare(folders.read_manifest(final)["describe"], self.describe)
            if not differing:
                log.info("step %d is saved already", step)
                return None
            raise CheckpointError(
                f"step {step} is committed already, for another model:\n{index.shorten(differing)}",
                final,
                "choose another run_dir, or move this folder away",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CheckpointError(
                f"saving step {step} needs {bytes_(needed)} and the disk has {bytes_(free)} left",
                self.path,
                "free space there, or lower checkpoint.keep_last; earlier checkpoints are untouched",
            )
        return folders.open_attempt(self.path, step).name

    def _finish(self, saving: _Saving) -> None:
        """The background thread: its failure waits in `_failure` for the next call."""
        try:
            self._write(saving)
        except (Exception, CheckpointException) as cause:
            self._failure = _told(cause, saving.attempt)
            self._failure.__cause__ = None if self._failure is cause else cause
            if self._crew.rank == 0:
                folders.clear(self.path, saving.step, saving.attempt)

    def _write(self, saving: _Saving) -> None:
        planner = StagedPlanner(self._crew.agree(saving.staged, saving.attempt))
        writer = ShardWriter(saving.attempt, self._crew.rank)
        dcp.save(saving.tensors, storage_writer=writer, planner=planner, process_group=self._crew.group)
        self._crew.agree(lambda: _raise(writer.error), saving.attempt)
        self._crew.lead(lambda: self._commit(saving, writer), saving.attempt)

    def _commit(self, saving: _Saving, writer: ShardWriter) -> None:
        """First rank only, after all have written."""
        table = saving.attempt / index.NAME
        files = [vars(written) for written in writer.files]
        files.append({"file": table.name, "bytes": table.stat().st_size, "sha256": tensorfile.sha256(table)})
        manifest = {
            "step": saving.step,
            "describe": {**self.describe, "torch": torch.__version__},
            "extra": saving.extra,
            "files": files,
        }
        folders.commit(saving.attempt, saving.step, manifest)
        try:
            folders.retire(self.path, self.cfg)
        except OSError as cause:
            log.warning("step %d is saved, but an old checkpoint cannot be deleted: %s", saving.step, cause)

    def _entries(self, folder: Path) -> dict[str, Entry]:
        """The index of a checkpoint that is whole and of this model."""
        manifest, entries = audit.opened(folder)
        _same(audit.compare(manifest["describe"], self.describe), folder)
        return entries

    def _asked(self, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], folder: Path) -> set[str]:
        """Names of a checkpoint that any rank asks for: each rank of a pipeline asks for its own stages."""
        names = sorted(entries)
        mine = sum(1 << place for place, name in enumerate(names) if name in tensors)
        all_ranks = functools.reduce(operator.or_, self._crew.gather(mine, folder))
        return {name for place, name in enumerate(names) if all_ranks >> place & 1}

    def _settle(self) -> None:
        """Wait for the save in flight; raise what went wrong there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _told(cause: BaseException, where: Path) -> CheckpointError:
    """What a background thread or a load met, as the one error that every rank raises."""
    if isinstance(cause, CheckpointError):
        return cause
    if isinstance(cause, CheckpointException):
        rank, (first, _) = min(cause.failures.items())
        told = explained(first, where)
        return CheckpointError(f"{told.what} (rank {rank})", told.where, told.fix)
    if isinstance(cause, RuntimeError):  # our own work never raises it here, so a collective did
        return lost(cause, where)
    return explained(cause, where)


def _same(differing: Sequence[str], folder: Path) -> None:
    """CheckpointError when there are differences."""
    if differing:
        raise CheckpointError(
            f"this is a checkpoint of another model or optimizer, {len(differing)} tensors differ:\n"
            f"{index.shorten(differing)}",
            folder,
            "resume with the recipe in the run directory, or choose another run_dir",
        )


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
