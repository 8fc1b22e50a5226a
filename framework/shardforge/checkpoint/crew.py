"""The ranks that save and load together: either a phase works on all of them, or all of them raise the same error."""

from __future__ import annotations

import errno
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shardforge.core.errors import CheckpointError, ForgeError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""A rank waits this long for the slowest one to finish writing."""

FIXES = {
    errno.ENOSPC: "free space there, or lower checkpoint.keep_last; earlier checkpoints are untouched",
    errno.EDQUOT: "free space within your quota, or lower checkpoint.keep_last; earlier checkpoints are untouched",
    errno.EACCES: "make the folder writable for the user of this run",
    errno.EROFS: "the file system is mounted read-only; choose another run_dir",
}


class Crew:
    """A gloo group of its own, so that a background thread never meets a collective of the training step.

    Creating and closing it is collective, unless a group is given. Without torch.distributed it is this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.joined = dist.is_available() and dist.is_initialized()
        self.owned = self.joined and group is None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.owned else group
        self.rank = dist.get_rank(self.group) if self.joined else 0
        self.size = dist.get_world_size(self.group) if self.joined else 1

    def agree(self, work: Callable[[], T], where: object) -> T:
        """work() of this rank, once it has succeeded on every rank; CheckpointError everywhere when it has not."""
        value, error = _attempt(work, where)
        for rank, other in enumerate(self.gather(error, where)):
            if other is not None:
                raise self._told(other, rank)
        assert value is not None
        return value[0]

    def lead(self, work: Callable[[], T], where: object) -> T:
        """work() of the first rank, given to all; it must be small and picklable."""
        mine = _attempt(work, where) if self.rank == 0 else (None, None)
        value, error = self.gather(mine, where)[0]
        if error is not None:
            raise self._told(error, 0)
        assert value is not None
        return value[0]

    def close(self) -> None:
        if self.owned and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.owned = False

    def gather(self, value: T, where: object) -> list[T]:
        """`value` of every rank, in order; it must be small and picklable."""
        if not self.joined:
            return [value]
        everyone: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everyone, value, group=self.group)
        except RuntimeError as cause:
            raise lost(cause, where) from cause
        return everyone

    def _told(self, error: ForgeError, rank: int) -> ForgeError:
        if self.size == 1 or not isinstance(error, CheckpointError):
            return error
        return CheckpointError(f"{error.what} (rank {rank})", error.where, error.fix)


def _attempt(work: Callable[[], T], where: object) -> tuple[tuple[T] | None, ForgeError | None]:
    try:
        return (work(),), None
    except ForgeError as error:
        return None, error
    except Exception as cause:
        return None, explained(cause, where)


def lost(cause: RuntimeError, where: object) -> CheckpointError:
    """A collective failed: some rank is gone."""
    return CheckpointError(
        f"a rank was lost while a checkpoint was saved or loaded ({str(cause).splitlines()[0]})",
        where,
        "see the first failing rank's error; the newest committed checkpoint is untouched",
    )


def explained(cause: BaseException, where: object) -> CheckpointError:
    """A failure of the disk or the program as a sentence with a next step."""
    if isinstance(cause, OSError):
        fix = FIXES.get(cause.errno or 0, "check the file system")
        return CheckpointError(cause.strerror or str(cause), cause.filename or where, fix)
    return CheckpointError(f"{type(cause).__name__}: {cause}", where, "see the traceback with --traceback")
