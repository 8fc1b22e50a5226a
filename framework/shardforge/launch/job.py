"""What one submission asks for: recipes, a cluster and a few wishes become numbers of nodes, ranks and seconds."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardforge.core.errors import ForgeError, LaunchError, Problems
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.launch.cluster import Cluster, mistake, seconds
from shardforge.recipe.schema import Recipe

SPARE_S = 60
"""Slurm sends the signal of --signal up to a minute before it was asked to, and ends a job as late."""


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for; None leaves it to the profile and the layout."""

    nodes: int | None = None
    walltime: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class Job:
    """One job, or one array of jobs that differ in their recipe alone. Paths are absolute."""

    name: str
    recipes: Mapping[str, Recipe]  # name of an arm -> its recipe; one entry for a single run
    cluster: Cluster
    nodes: int  # that train; spares come on top
    ranks: int  # on each node
    style: str
    walltime: str
    folder: Path  # where sbatch is called: relative paths of the recipe begin here
    array: bool = False
    chained: bool = False

    @property
    def runs(self) -> tuple[RunDir, ...]:
        return tuple(RunDir(Path(recipe.run_dir)) for recipe in self.recipes.values() if recipe.run_dir)

    @property
    def recipe(self) -> Recipe:
        return next(iter(self.recipes.values()))

    @property
    def layout(self) -> Layout:
        return self.recipe.parallel

    @property
    def gpus(self) -> int:
        """GPUs asked for on each node."""
        return min(self.ranks, self.cluster.config.node.gpus)

    @property
    def home(self) -> RunDir:
        """Where script and submissions are kept: the run, or the folder of all runs of an array."""
        first = self.runs[0]
        return RunDir(first.path.parent) if self.array else first

    @property
    def rank_cpus(self) -> int:
        return max(1, self.cluster.config.node.cpus // self.ranks)


def plan(
    recipes: Mapping[str, Recipe],
    cluster: Cluster,
    wishes: Wishes,
    *,
    name: str,
    folder: Path,
    array: bool = False,
) -> Job:
    """The job of these recipes; Problems with everything that does not fit, the profile's line with each.

    Nothing is written, and Slurm is not asked.
    """
    placed = {arm: replace(recipe, run_dir=str(place(recipe, folder))) for arm, recipe in recipes.items()}
    found: list[ForgeError] = []
    nodes, ranks = _shape({arm: recipe.parallel for arm, recipe in placed.items()}, cluster, wishes, found)
    walltime = wishes.walltime or cluster.config.queue.walltime
    found += _time_problems(cluster, wishes, walltime)
    found += [problem for recipe in placed.values() for problem in disk_problems(cluster, Path(str(recipe.run_dir)))]
    if found:
        unique = {str(problem): problem for problem in found}
        raise Problems(unique.values(), f"launching {name} on {cluster.name}")
    style = wishes.style or cluster.config.style
    return Job(job_name(name, placed), placed, cluster, nodes, ranks, style, walltime, folder, array)


def place(recipe: Recipe, folder: Path) -> Path:
    """The absolute run directory."""
    return Path(os.path.normpath(folder / (recipe.run_dir or f"runs/{recipe.name}")))


def job_name(name: str, recipes: Mapping[str, Recipe]) -> str:
    """A name that no other run's jobs have: jobs of one chain wait for each other by it."""
    places = "\n".join(sorted(str(recipe.run_dir) for recipe in recipes.values()))
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{hashlib.sha256(places.encode()).hexdigest()[:6]}"


def _shape(layouts: Mapping[str, Layout], cluster: Cluster, wishes: Wishes, found: list[ForgeError]) -> tuple[int, int]:
    """(nodes, ranks on each); 1, 1 with a problem noted where there is none that fits."""
    sizes = {arm: layout.world_size for arm, layout in layouts.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
        fix = "give all arms layouts of one size, or launch them one by one with their own sweep files"
        found.append(
            LaunchError(
                f"the jobs of an array are equally large, and the arms need different: {told} ranks", "parallel", fix
            )
        )
        return 1, 1
    layout = next(iter(layouts.values()))
    world, most, queue = layout.world_size, cluster.config.node.processes, cluster.config.queue
    nodes = wishes.nodes or math.ceil(world / most)
    at = "--nodes" if wishes.nodes else cluster.where("node.gpus" if cluster.config.node.gpus else "node.ranks")
    ranks, left = divmod(world, nodes)
    if left or not 1 <= ranks <= most:
        found.append(_misfit(layout, cluster, nodes, at))
        ranks = 1
    if queue.nodes_most is not None and nodes + queue.spares > queue.nodes_most:
        spares = f" and {queue.spares} spare" if queue.spares else ""
        what = f"{nodes} nodes{spares} are more than the {queue.nodes_most} that a job may have on {cluster.name}"
        found.append(mistake(cluster, "queue.nodes_most", what, "choose a smaller layout, or another partition"))
    return nodes, ranks


def _misfit(layout: Layout, cluster: Cluster, nodes: int, at: str) -> LaunchError:
    world, most = layout.world_size, cluster.config.node.processes
    what = f"{nodes} nodes x {most} ranks = {nodes * most}, and the layout {layout} has {world} ranks"
    fitting = [count for count in range(math.ceil(world / most), world + 1) if world % count == 0]
    fixes = [f"--nodes {fitting[0]}"] if fitting else []
    others = world // layout.dp_shard
    if (nodes * most) % others == 0:
        fixes.append(f"--set parallel.dp_shard={nodes * most // others} fills {nodes} nodes")
    return LaunchError(what, at, ", or ".join(fixes))


def _time_problems(cluster: Cluster, wishes: Wishes, walltime: str) -> list[ForgeError]:
    queue = cluster.config.queue
    at = "--walltime" if wishes.walltime else cluster.where("queue.walltime")
    try:
        limit = seconds(walltime)
    except ValueError as cause:
        return [LaunchError(str(cause), at, "write HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")]
    needed = queue.startup_s + queue.lead_s + SPARE_S
    if limit > needed:
        return []
    what = (
        f"{walltime} is {limit} s; start-up ({queue.startup_s} s), a save ahead of the limit ({queue.lead_s} s) and "
        f"Slurm's own {SPARE_S} s take {needed} s: no step would be trained"
    )
    return [LaunchError(what, at, f"ask for more than {math.ceil(needed / 60)} minutes, or lower lead_s, startup_s")]


def disk_problems(cluster: Cluster, run_dir: Path) -> list[ForgeError]:
    """A run directory where each node has a disk of its own: the checkpoint of one rank would not meet the others'."""
    storage = cluster.config.storage
    path = run_dir.resolve()
    if any(path.is_relative_to(Path(root)) for root in storage.shared):
        return []
    for root in storage.local:
        if path.is_relative_to(Path(root)):
            what = f"the run directory {run_dir} is below {root}, which every node of {cluster.name} has for itself"
            fix = "--set run_dir=... on a file system that all nodes share, or list it under storage.shared"
            return [LaunchError(what, cluster.where("storage.local"), fix)]
    return []


def chained(job: Job, walltime: str | None = None) -> Job:
    """The same job as one of a chain: at a time limit it leaves the rest to the next one."""
    return replace(job, chained=True, walltime=walltime or job.walltime)


def idle_words(job: Job) -> str:
    """What the job leaves unused on nodes that it has for itself; empty when nothing."""
    node = job.cluster.config.node
    left = node.gpus - job.gpus
    return f"{left} of {node.gpus} GPUs of each node stay idle" if node.exclusive and left > 0 else ""


def options(extra: Mapping[str, str]) -> Sequence[str]:
    """Options by long name as sbatch reads them."""
    return [f"--{name}={value}" if value else f"--{name}" for name, value in extra.items()]
