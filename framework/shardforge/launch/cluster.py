"""A cluster profile: what a machine room offers and how its jobs are started. Files of recipes/clusters.

Read as strictly as a recipe: an unknown key, a wrong type and a number out of range are named with file, line and
column, all at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardforge.core.errors import ForgeError, LaunchError, Problems, RecipeError, suggest
from shardforge.core.options import REQUIRED, option
from shardforge.launch.environment import Environment
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.recipe.build import build
from shardforge.recipe.load import PROFILES, names, shipped
from shardforge.recipe.provenance import dump as written
from shardforge.recipe.tree import DEFAULT, Origin, override, read

DURATION = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
SIZES = ("nodes", "ntasks-per-node", "gpus-per-node", "gres", "time", "output", "signal", "nodelist")
"""Options of sbatch that follow from the recipe, the layout or the survival of the job, and cannot be passed by."""


def seconds(text: str) -> int:
    """A time as Slurm writes it: MIN, MIN:SEC, HOURS:MIN:SEC, DAYS-HOURS[:MIN[:SEC]]. ValueError for anything else."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time that Slurm reads")
    a, b, c = (int(match[name]) if match[name] else 0 for name in "abc")
    if match["d"]:
        return int(match["d"]) * 86400 + a * 3600 + b * 60 + c
    return a * 3600 + b * 60 + c if match["c"] else a * 60 + b


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    partition: str | None = option(None, "sbatch --partition; empty: the cluster's default")
    account: str | None = option(None, "sbatch --account: who pays")
    qos: str | None = option(None, "sbatch --qos")
    reservation: str | None = option(None, "sbatch --reservation")
    constraint: str | None = option(None, "sbatch --constraint: features that every node must have")
    switches: int | None = option(None, "leaf switches that the nodes may hang on, --switches", at_least=1)
    switches_wait: str = option("01:00:00", "how long the job waits for as few switches before it takes more")
    exclude: tuple[str, ...] = option((), "nodes that are not wanted, --exclude")
    spares: int = option(0, "nodes more than needed, which replace lost or bad ones without the queue", at_least=0)
    nodes_most: int | None = option(None, "nodes that one job may have here", at_least=1)
    walltime: str = option("24:00:00", "time limit of one job, as Slurm writes it; --walltime changes it")
    lead_s: int = option(
        600, "how long before the limit a run is told to save: a save and a step and 60 s", unit="seconds", at_least=1
    )
    startup_s: int = option(300, "what preflight, imports and loading take", unit="seconds", at_least=0)
    chain: Literal["singleton", "afterany"] = option("singleton", "how the jobs of a chain wait for each other")
    options: Mapping[str, str] = option({}, "further options of sbatch by long name; '' for one without a value")

    def __post_init__(self) -> None:
        for field in ("walltime", "switches_wait"):
            try:
                seconds(getattr(self, field))
            except ValueError as cause:
                fix = "write HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
                raise LaunchError(str(cause), field, fix) from None
        own = [name for name in self.options if name in SIZES]
        if own:
            fix = "leave it out; nodes, GPUs, walltime and lead_s have fields of their own"
            raise LaunchError(f"--{own[0]} is decided by ShardForge", "options", fix)


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    gpus: int = option(0, "GPUs of a node; 0: a cluster of CPUs", at_least=0)
    gpu_type: str | None = option(None, "type of GPU in requests, as the cluster's gres names it: h100")
    gpu_request: Literal["gpus_per_node", "gres"] = option(
        "gpus_per_node", "--gpus-per-node=[TYPE:]N or --gres=gpu:[TYPE:]N; many sites take only one of them"
    )
    ranks: int | None = option(None, "processes of a node; empty: one a GPU, or one on a node without", at_least=1)
    cpus: int = option(REQUIRED, "CPUs that the job gets of a node, divided among its processes", at_least=1)
    memory_gb: float | None = option(None, "memory of a node for the job; empty: all of it, --mem=0", above=0)
    exclusive: bool = option(True, "whole nodes: nobody else's job beside this one")

    @property
    def processes(self) -> int:
        """Most ranks that a node takes."""
        return self.ranks or self.gpus or 1


@dataclass(frozen=True, kw_only=True)
class VariableConfig:
    value: str = option(REQUIRED, "the value")
    reason: str = option(REQUIRED, "why it is set here; a comment in the script")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    files: tuple[str, ...] = option(("ranks",), "files of slurm/env, or paths: lines of bash with their reasons")
    variables: Mapping[str, VariableConfig] = option({}, "variables of this cluster, set after the files")
    ports: tuple[int, int] = option((20000, 28000), "first and last port for rendezvous, below the ephemeral ones")

    def __post_init__(self) -> None:
        first, last = self.ports
        if not 1024 <= first <= last - 64 or last > 65535:
            what = f"{first} to {last} leaves no room for the ports of several jobs"
            raise LaunchError(what, "ports", "write two numbers from 1024 to 65535, 64 or more apart")
        bad = [name for name in self.variables if not re.fullmatch(r"[A-Za-z_]\w*", name)]
        if bad:
            raise LaunchError(f"{bad[0]!r} cannot be a variable", "variables", "letters, digits and underscores")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    local: tuple[str, ...] = option(
        ("/tmp", "/var/tmp", "/dev/shm", "/run"),
        "folders that each node has for itself; a run directory cannot be there",
    )
    shared: tuple[str, ...] = option((), "folders below those that all nodes share nevertheless")
    scratch: str | None = option(None, "folder of each node for compiler caches; may name $SLURM_JOB_ID")


@dataclass(frozen=True, kw_only=True)
class RestartsConfig:
    most: int = option(50, "restarts after a failure, over the life of a run; time limits do not count", at_least=0)
    without_progress: int = option(2, "failures in a row without a new checkpoint after which it stops", at_least=1)
    inside: int = option(1, "tries after a failure inside one job, before it goes back to the queue", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    scheduler: Literal["slurm", "local"] = option(REQUIRED, "slurm, or local: this machine, without a queue")
    style: Literal["srun", "torchrun"] = option("srun", "srun starts every rank, or one torchrun on each node")
    queue: QueueConfig = option(QueueConfig(), "what sbatch is asked for")
    node: NodeConfig = option(REQUIRED, "what a node has")
    environment: Environment = option("host", "how the nodes run Python: host, pyxis, apptainer")
    network: NetworkConfig = option(NetworkConfig(), "variables of NCCL and gloo, ports")
    storage: StorageConfig = option(StorageConfig(), "which folders are whose")
    preflight: PreflightConfig | None = option(
        PreflightConfig(), "what nodes must have before a start; null: no checks"
    )
    restarts: RestartsConfig = option(RestartsConfig(), "how often a run comes back by itself")


@dataclass(frozen=True)
class Cluster:
    """A profile and where each of its values was written."""

    name: str
    config: ClusterConfig
    origins: Mapping[str, Origin]
    path: Path

    def where(self, field: str) -> str:
        """file:line:column of a field, or the command line, with its name; the file where the profile leaves it out."""
        origin = self.origins.get(field, DEFAULT)
        return f"{self.path if origin == DEFAULT else origin}  {field}"


def load(name_or_path: str | Path, sets: Sequence[str] = ()) -> Cluster:
    """The profile of a file, or of one in recipes/clusters by name, with `sets` put over it.

    Problems lists everything that is wrong with it; RecipeError is for a file that is not there or is not YAML.
    """
    path = find(name_or_path)
    tree, problems = read(path, lambda name: find(name))
    found: list[ForgeError] = list(problems)
    for text in sets:
        try:
            tree = override(tree, text, "--profile-set")
        except RecipeError as error:
            found.append(error)
    try:
        config, origins = build(ClusterConfig, tree, found)
    except Problems as many:
        raise Problems(many.problems, f"the cluster profile {path}") from None
    return Cluster(path.stem, config, origins, path)


def find(name_or_path: str | Path) -> Path:
    """The file of a profile: an existing path, or a name in recipes/clusters here or as shipped."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    wanted, known = str(name_or_path).removesuffix(".yaml"), {}
    for folder in (Path("recipes", PROFILES), shipped() / PROFILES):
        known = {**names(folder), **known}
    if wanted in known:
        return known[wanted]
    raise RecipeError(
        f"there is no cluster profile {wanted!r}, as a file or by name", "--cluster", suggest(wanted, known)
    )


def dump(cluster: Cluster) -> str:
    """YAML of the resolved profile, which loads back to the same."""
    return written(cluster.config)


def mistake(cluster: Cluster, field: str, what: str, fix: str) -> LaunchError:
    """A mistake of the profile, where it stands."""
    return LaunchError(what, cluster.where(field), fix)
