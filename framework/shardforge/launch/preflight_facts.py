"""What one node is like, as it sees itself. Nothing here judges, and nothing imports torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from shardforge.core.errors import ForgeError
from shardforge.launch.preflight_wanted import Wanted

SMI_S = 20.0
"""nvidia-smi on a node whose driver hangs never ends."""
QUERY = ("index", "uuid", "name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")
VISIBLE = "CUDA_VISIBLE_DEVICES"
MIB = 1024 * 1024
IDLE_S, AGAIN_S = 15.0, 1.0
"""The memory of ranks that have just ended is free again within this time; time between looks."""
SEEN_S, LOOK_S = 10.0, 0.25
"""A file that another node has just made is visible within this time on a shared file system; time between looks."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    index: int
    name: str
    used: int  # bytes
    ecc: int  # uncorrected memory errors since the driver was loaded


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one node. A text named `..._error` is empty where all is well."""

    host: str
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # driver, python, torch, NCCL, ...
    free_memory: int = 0  # bytes
    free_disk: int = 0  # bytes, at the run directory
    write_bytes_s: float = 0.0
    write_error: str = ""
    token: bool = True  # whether what the first node wrote into the run directory is there
    filesystem: str = ""  # of the run directory: "nfs4"
    data: Mapping[str, str] = field(default_factory=dict)  # folder -> fingerprint of the corpus
    data_errors: Mapping[str, str] = field(default_factory=dict)  # folder -> why there is none
    clock_s: float = 0.0  # ahead of the first node's clock; set by who asked
    clock_error_s: float = 0.0  # how far off that may be


def from_plain(told: Mapping[str, Any]) -> Facts:
    return Facts(**{**told, "gpus": tuple(Gpu(**each) for each in told["gpus"])})


def gather(wanted: Wanted, folder: Path, node: str, token: str) -> Facts:
    """Look at this node. `folder` is in the run directory; `token`, if any, a file that must be in it."""
    found, driver, gpu_error = idle_gpus(wanted.config.gpu_used, IDLE_S) if wanted.checks_gpus else ((), "", "")
    speed, write_error = write_speed(folder, node, wanted.config.write_bytes)
    data, data_errors = corpora(wanted.data)
    return Facts(
        host=platform.node(),
        gpus=found,
        gpu_error=gpu_error,
        versions={**({"driver": driver} if driver else {}), **versions()},
        free_memory=free_memory(),
        free_disk=free_disk(folder),
        write_bytes_s=speed,
        write_error=write_error,
        token=not token or seen(folder / token, SEEN_S),
        filesystem=filesystem(folder),
        data=data,
        data_errors=data_errors,
    )


def idle_gpus(
    most: int, patience_s: float, pause: Callable[[float], None] = time.sleep
) -> tuple[tuple[Gpu, ...], str, str]:
    """As `gpus`, once none has more than `most` bytes taken, or the patience is over: an earlier try may still end."""
    found = gpus()
    for _ in range(round(patience_s / AGAIN_S)):
        if all(gpu.used <= most for gpu in found[0]):
            break
        pause(AGAIN_S)
        found = gpus()
    return found


def gpus() -> tuple[tuple[Gpu, ...], str, str]:
    """(GPUs that this process may use, driver version, why there are none)."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S)
    except FileNotFoundError:
        return (), "", "nvidia-smi is not there"
    except subprocess.TimeoutExpired:
        return (), "", f"nvidia-smi did not answer in {SMI_S:.0f} s"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return (), "", f"nvidia-smi says: {said[-1] if said else f'exit code {done.returncode}'}"
    try:
        found, driver = parse_smi(done.stdout, os.environ.get(VISIBLE))
    except ValueError:
        return (), "", f"nvidia-smi answers what is no table of GPUs: {done.stdout.strip()[:200]}"
    return found, driver, ""


def parse_smi(table: str, visible: str | None) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs of nvidia-smi's table that `visible` (indices or UUIDs, None for all) lets through, and the driver."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(table)) if row]
    allowed = None  # also for parts of GPUs, which are not in the table
    if visible is not None and "MIG-" not in visible:
        allowed = {word.strip() for word in visible.split(",") if word.strip()}
    found, driver = [], ""
    for index, uuid, name, version, used, ecc in rows:
        driver = version
        if allowed is None or index in allowed or any(uuid.startswith(word) for word in allowed if "-" in word):
            errors = int(ecc) if ecc.isdecimal() else 0  # "[N/A]" where memory has no ECC
            found.append(Gpu(index=int(index), name=name, used=int(used) * MIB, ecc=errors))
    return tuple(found), driver


def versions() -> dict[str, str]:
    """Of what all nodes must have alike."""
    found = {"python": platform.python_version()}
    for package in ("shardforge", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def free_memory() -> int:
    """Bytes that new processes can have here."""
    import psutil

    return psutil.virtual_memory().available


def free_disk(folder: Path) -> int:
    """Bytes that this user can still write at `folder`; 0 where nothing is known."""
    try:
        left = os.statvfs(nearest(folder))
    except OSError:
        return 0
    return left.f_bavail * left.f_frsize


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    return next(each for each in (folder, *folder.parents) if each.exists() or each == each.parent)


def write_speed(folder: Path, node: str, size: int) -> tuple[float, str]:
    """(bytes per second of writing `size` bytes to `folder` until they are safe, why it could not be done)."""
    probe = folder / f"{node}.{os.getpid()}.probe"
    block = os.urandom(min(size, MIB))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        try:
            with probe.open("wb") as file:
                for _ in range(0, size, len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            taken = time.perf_counter() - begin
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return 0.0, error.strerror or str(error)
    return size / max(taken, 1e-9), ""


def seen(token: Path, patience_s: float, pause: Callable[[float], None] = time.sleep) -> bool:
    """Whether the file is there; one that is not may still be on its way."""
    for _ in range(max(1, round(patience_s / LOOK_S))):
        try:
            if token.name in os.listdir(token.parent):  # a listing is asked of the server, a lookup may be remembered
                return True
        except OSError:
            pass
        pause(LOOK_S)
    return token.exists()


def filesystem(folder: Path, mounts: str | None = None) -> str:
    """Type of the file system that `folder` lies on; empty where the system does not say."""
    if mounts is None:
        source = Path("/proc/self/mounts")
        mounts = source.read_text() if source.exists() else ""
    place, found, longest = str(nearest(folder).resolve()), "", -1
    for line in mounts.splitlines():
        _, where, kind = line.split(" ")[:3]
        where = where.replace("\\040", " ")
        inside = place == where or place.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= longest:  # a later mount covers an earlier one
            found, longest = kind, len(where)
    return found


def corpora(folders: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """({folder: fingerprint}, {folder: why it cannot be read}). Shards are not read, but the first byte of each is."""
    from shardforge.data import manifest

    known: dict[str, str] = {}
    errors: dict[str, str] = {}
    for folder in folders:
        try:
            content = manifest.read(Path(folder))
            for shards in content.splits.values():
                for shard in shards:
                    with (Path(folder) / f"{shard.name}.bin").open("rb") as file:
                        file.read(1)
            known[folder] = manifest.fingerprint(content)
        except ForgeError as error:
            errors[folder] = error.what
        except OSError as error:
            errors[folder] = f"{error.strerror}: {error.filename}"
    return known, errors


def plain(facts: Facts) -> dict[str, Any]:
    return dataclasses.asdict(facts)
