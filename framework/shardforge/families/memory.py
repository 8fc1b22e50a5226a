"""Memory that this process may still take: of the machine, of its control group (a Slurm job, a container), its own."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free(groups: Path = GROUPS, group: Path = GROUP) -> int:
    """Bytes: the least that any of the limits leaves."""
    used = psutil.Process().memory_info()
    own = {resource.RLIMIT_AS: used.vms, resource.RLIMIT_DATA: getattr(used, "data", used.vms)}
    limits = ((resource.getrlimit(kind)[0], size) for kind, size in own.items())
    left = [limit - size for limit, size in limits if limit != resource.RLIM_INFINITY]
    return max(0, min([psutil.virtual_memory().available, *left, *_left(groups, group)]))


def _left(groups: Path, group: Path) -> Iterator[int]:
    """Of the control groups (version 2) that the process is in; nothing where there are none."""
    try:
        (place,) = (line[3:] for line in group.read_text().splitlines() if line.startswith("0::"))
    except (OSError, ValueError):
        return
    inner = groups / place.lstrip("/")
    for folder in [inner, *inner.parents]:
        if not folder.is_relative_to(groups):
            return
        try:
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the outermost has no limit
        if limit != "max":
            yield int(limit) - int(used) + int(stat.get("inactive_file", 0))  # pages of files go when asked to
