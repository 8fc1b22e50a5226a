"""One living run a directory: the first rank holds a file lock, which the system drops however the process ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from shardforge.core.errors import LaunchError


class Occupied(LaunchError):
    """The directory belongs to a living run: nothing in it may be touched."""


def take(path: Path) -> IO[str]:
    """Lock `path` until the returned file is closed; Occupied naming the owner when another process has it."""
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
    except OSError:
        file.seek(0)
        owner = _owner(file.read())
        file.close()
        raise Occupied(
            f"a run is alive in this directory ({owner})",
            path.parent,
            "wait for it, stop it, or give this one another place with --set run_dir=...",
        ) from None
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    file.flush()
    return file


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError):
        return "its owner is unknown"
