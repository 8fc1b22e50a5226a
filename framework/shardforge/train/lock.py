"""One living run a directory.

The first rank holds a file lock, which the system drops however the process ends. That is exact on one machine. Between
machines it depends on the file system, so the file is a lease as well: its holder sets the file's time every BEAT_S
seconds. A start on another machine that finds a holder in the file watches that time for STALE_S seconds, by its own
clock: when it moves, a run is alive there; when it does not, the lease is stale and changes hands. A holder that finds
another one in the file, after a time in which it was stopped or cut off, ends its process and writes nothing more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from shardforge.core.errors import LaunchError
from shardforge.train.failure import node_name

BEAT_S, STALE_S = 2.0, 15.0
BUSY = (errno.EWOULDBLOCK, errno.EACCES)
BOOT = Path("/proc/sys/kernel/random/boot_id")
EVICTED = 2
FIX = "wait for it, stop it, or give this one another place with --set run_dir=..."


class Occupied(LaunchError):
    """The directory belongs to a living run: nothing in it may be touched. `owner` is its start, or its process."""

    def __init__(self, what: str, where: object, owner: str):
        super().__init__(what, where, FIX)
        self.owner = owner

    def __reduce__(self) -> tuple[object, ...]:
        return Occupied, (self.what, self.where, self.owner)


@dataclass(frozen=True)
class Holder:
    """Who has written a lock file."""

    host: str
    pid: int
    start: str = ""  # the launcher's name of it
    machine: str = ""  # until it is booted again
    id: str = ""
    node: str = ""  # the host as the scheduler calls it

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Owner:
    """For people and launchers: `silent_s` is the time since the last beat, by this machine's clock."""

    host: str
    pid: int
    start: str
    silent_s: float

    @property
    def alive(self) -> bool:
        return self.silent_s < STALE_S


class Lease:
    """A directory that is ours until `close`. `lost` is called, with the new holder, when it is not any more."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self._file, self._ended = path, file, threading.Event()
        self.holder = Holder(socket.gethostname(), os.getpid(), _start(), machine(), uuid.uuid4().hex, node_name())
        self.lost: Callable[[Holder], None] = evicted
        file.truncate(0)
        json.dump(asdict(self.holder), file)
        file.flush()
        beating = threading.Thread(target=_beat, args=(weakref.ref(self), self._ended), daemon=True)
        beating.name = "shardforge-lease"
        beating.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory back."""
        self._ended.set()
        if not self._file.closed:
            if holder_of(self.path) == self.holder:
                self._file.truncate(0)
            self._file.close()

    def beat(self) -> None:
        """Say that this process lives, unless the lease has changed hands."""
        holder = holder_of(self.path)
        if holder is not None and holder != self.holder:
            self.lost(holder)
        elif not self._file.closed:
            os.utime(self._file.fileno())


def _beat(held: weakref.ref[Lease], ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        lease = held()
        if lease is None:
            return
        try:
            lease.beat()
        except (OSError, ValueError):
            continue  # a file system that fails for a moment, or a file that is being closed
        finally:
            del lease


def evicted(holder: Holder) -> None:
    """This process was thought dead: end it."""
    print(f"error: the run directory has changed hands while this process stood still: {holder}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(EVICTED)


def take(path: Path, pause: Callable[[float], None] = time.sleep) -> Lease:
    """The lease of `path` until it is closed; Occupied naming the owner when another process has it.

    Takes up to STALE_S seconds after a holder on another machine that never gave it back.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
    except OSError as cause:
        raise LaunchError(
            f"this cannot be a run directory: {cause.strerror or cause}",
            path.parent,
            "make it writable, or choose another place with --set run_dir=...",
        ) from cause
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alive = False
    except OSError as cause:
        alive = cause.errno in BUSY  # else this file system has no locks, and the lease decides
    holder = holder_of(path)
    if not alive and holder is not None and holder.machine != machine():
        alive = _moves(path, pause)
    if not alive:
        return Lease(path, file)
    file.close()
    told = str(holder or "its owner is unknown")
    owner = (holder.start if holder else "") or told
    raise Occupied(f"a run is alive in this directory ({told})", path.parent, owner)


def owner(path: Path) -> Owner | None:
    """Who has the lease of `path`, or has died with it; None where it was given back."""
    holder = holder_of(path)
    if holder is None:
        return None
    try:
        silent = time.time() - path.stat().st_mtime
    except OSError:
        return None
    return Owner(holder.host, holder.pid, holder.start, silent)


def machine() -> str:
    """This machine until it is booted again; its name where the system does not tell."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _moves(path: Path, pause: Callable[[float], None]) -> bool:
    """Whether the time of the file changes within STALE_S. Each look opens it: a network file system may else remember
    what it was."""
    seen = beat_of(path)
    for _ in range(round(STALE_S / BEAT_S) + 1):
        pause(BEAT_S)
        if beat_of(path) != seen:
            return True
    return False


def beat_of(path: Path) -> int:
    """The time of the last beat, to be compared with another look at it and with no clock."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def holder_of(path: Path) -> Holder | None:
    """Who has written the file; None where the lease was given back."""
    try:
        found = json.loads(path.read_text())
        return Holder(**{name: found[name] for name in Holder.__dataclass_fields__ if name in found})
    except (OSError, ValueError, TypeError):
        return None


def _start() -> str:
    return os.environ.get("SHARDFORGE_START", "")
