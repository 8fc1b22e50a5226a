"""A recipe becomes a run: directory, data, engine, checkpoints, observers. What `loop` then turns."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardforge.checkpoint import folders
from shardforge.checkpoint.store import Store
from shardforge.checkpoint.tensorfile import write_whole
from shardforge.core import units
from shardforge.core.errors import DataError, ForgeError, Problems, RecipeError
from shardforge.core.log import logger
from shardforge.core.rundir import RunDir
from shardforge.data.loader import Loader
from shardforge.engine.base import Engine
from shardforge.families.source import Source
from shardforge.observe.audience import Audience
from shardforge.observe.base import Observer, RunInfo
from shardforge.observe.jsonl import MetricsFile
from shardforge.observe.progress import display
from shardforge.plan.ranks import summary
from shardforge.precision.types import DTYPES
from shardforge.recipe.load import Loaded, load
from shardforge.recipe.provenance import content_hash, differences, dump, plain
from shardforge.recipe.schema import Recipe
from shardforge.train import attempt, lock, peak, provenance, start
from shardforge.train.world import World

log = logger("train")

KEPT = ("seed", "model", "objective", "data.packing", "data.documents", "data.shuffled", "data.sources")
KEPT += ("train.sequences", "train.seq_len", "train.batch_warmup", "train.start", "train.start_moments")
"""Fields that a run directory keeps for life, with all below them: they decide weights and data order."""
FREE = ("model.core", "model.blocks.*.mixer.position.scaling", "model.blocks.*.mixer.evaluation")
"""Fields among them that decide neither, `*` for any name: how attention is computed, and the scaling of positions,
which has no weights, so that a run can go on at the rates of a longer context."""


@dataclass
class Run:
    """Everything the loop needs. Equal on all ranks but for `audience`, which is empty on all but the first."""

    recipe: Recipe
    dir: RunDir
    world: World
    engine: Engine
    data: Loader
    store: Store
    audience: Audience
    step: int  # steps finished
    peak_flops: float  # of all devices together
    held: lock.Lease | None  # of the directory


def directory(recipe: Recipe) -> RunDir:
    return RunDir(Path(recipe.run_dir or f"runs/{recipe.name}"))


def open_run(loaded: Loaded, world: World) -> Run:
    """Collective. A mistake is one ForgeError on all ranks, and then no file of an earlier run has changed."""
    recipe, run_dir = loaded.recipe, directory(loaded.recipe)
    held: list[lock.Lease] = []
    world.lead(lambda: check_place(loaded))
    world.lead(lambda: held.append(own(run_dir)))
    world.lead(lambda: check_same_run(run_dir, recipe))
    watching: list[Observer] = []
    world.lead(lambda: watching.extend(watchers(recipe, run_dir)))
    data = world.agree(lambda: open_data(recipe, world))
    source = world.agree(lambda: start.find(recipe, run_dir))
    engine = world.agree(lambda: recipe.engine.build(recipe, world.device))
    store = Store(run_dir.checkpoints, recipe.checkpoint, describe=engine.describe())
    step = resume(store, engine, data, world)
    if source is not None and step == 0:
        world.agree(lambda: start.begin(source, recipe, engine))
    rate = torch.tensor(peak.measure(world.device, DTYPES[recipe.precision.compute]), dtype=torch.float64)
    if world.control is not None:
        dist.all_reduce(rate, group=world.control)
    told = world.lead(lambda: attempt.facts(run_dir))
    world.lead(lambda: write_identity(loaded, run_dir, data, step, world, source, told))
    audience = Audience(watching)
    audience.on_start(
        RunInfo(
            name=recipe.name,
            path=run_dir.path,
            layout=str(recipe.parallel),
            world_size=world.size,
            weights=engine.weights,
            steps=recipe.train.steps,
            first_step=step,
            recipe=plain(recipe),
            unigram_entropy=data.corpora[0].manifest.unigram_nats if len(data.corpora) == 1 else None,
            attempt=told,
        )
    )
    return Run(recipe, run_dir, world, engine, data, store, audience, step, rate.item(), *(held or [None]))


def own(run_dir: RunDir) -> lock.Lease:
    """The lease of a directory that no living run has. A stop that an earlier one was asked for is forgotten, but not
    what our own launcher was asked for since it started these processes."""
    lease = lock.take(run_dir.lock)
    if "SHARDFORGE_START" not in os.environ:
        run_dir.stop.unlink(missing_ok=True)
    return lease


def watchers(recipe: Recipe, run_dir: RunDir) -> list[Observer]:
    return [MetricsFile(run_dir.metrics), display(), *(each.build() for each in recipe.observe)]


def check_place(loaded: Loaded) -> None:
    """RecipeError for the recipe of a run that lies beside its checkpoints and names another place for them: the folder
    was moved or copied, and training would begin anew there. --set run_dir=... says that this is meant."""
    if loaded.path is None or str(loaded.origins.get("run_dir", "")).startswith("--set "):
        return
    here, there = RunDir(loaded.path.parent), directory(loaded.recipe)
    steps = folders.committed(here.checkpoints) if loaded.path.name == here.recipe.name else []
    if not steps or "data" not in _extra(here, steps[-1]):
        return
    if here.path.resolve() != there.path.resolve() and not (there.path.exists() and there.path.samefile(here.path)):
        what = f"the run with step {steps[-1]} lies here, and its recipe names {there.path.absolute()}"
        fix = f"--set run_dir={here.path} goes on with it here, --set run_dir={there.path} trains there"
        raise RecipeError(what, loaded.path, fix)


def open_data(recipe: Recipe, world: World) -> Loader:
    ranks = recipe.parallel.data_ranks
    return Loader(
        recipe.data,
        recipe.train,
        recipe.seed,
        vocab=recipe.model.vocab,
        data_rank=recipe.parallel.data_rank(world.rank),
        data_ranks=ranks,
    )


def check_same_run(run_dir: RunDir, recipe: Recipe) -> None:
    """Refuse to go on with another run's directory, or with what is none; say which differences matter."""
    if (steps := folders.committed(run_dir.checkpoints)) and "data" not in _extra(run_dir, steps[-1]):
        what = "this folder holds weights to start from, as `shardforge upcycle` leaves them, and no run to go on with"
        raise RecipeError(what, run_dir.path, "train.start names it; give the run its own place: --set run_dir=...")
    if not run_dir.recipe.exists():
        return
    before = load(run_dir.recipe).recipe
    changes = differences(plain(before), plain(recipe))
    problems: list[ForgeError] = [
        RecipeError(f"{field}: {old!r} there, {new!r} here", run_dir.recipe)
        for field, old, new in changes
        if kept(field)
    ]
    if problems:
        problems.append(
            RecipeError("these decide weights and data order", fix="give the new run its own place: --set run_dir=...")
        )
        raise Problems(problems, f"going on with the run in {run_dir.path}")
    for field, old, new in changes:
        log.info("going on with %s: %r -> %r", field, old, new)


def _extra(run_dir: RunDir, step: int) -> dict[str, Any]:
    return folders.read_manifest(run_dir.checkpoints / folders.name(step))["extra"]


def kept(field: str) -> bool:
    def below(names: tuple[str, ...]) -> bool:
        return any(fnmatchcase(f"{field}.".replace("[", "."), f"{name}.*") for name in names)

    return below(KEPT) and not below(FREE) and not field.endswith(".path")  # moved data is known by its fingerprint


def resume(store: Store, engine: Engine, data: Loader, world: World) -> int:
    """Load the newest committed checkpoint; the number of finished steps comes back, 0 without one."""
    steps = world.lead(store.committed)
    if not steps:
        return 0
    saved = world.lead(lambda: store.extra(steps[-1]))
    if saved["data"] != data.fingerprint:
        raise DataError(
            f"the corpus has changed since the checkpoint of step {steps[-1]}: fingerprint {saved['data']} then, "
            f"{data.fingerprint} now",
            ", ".join(str(corpus.path) for corpus in data.corpora),
            "put the old corpus back, or start a new run with --set run_dir=...",
        )
    engine.load(lambda tensors: store.load(steps[-1], tensors))
    log.info("resumed after step %d from %s", steps[-1], store.path)
    return steps[-1]


def write_identity(
    loaded: Loaded,
    run_dir: RunDir,
    data: Loader,
    step: int,
    world: World,
    source: Source | None,
    told: dict[str, Any],
) -> None:
    """First rank: what this run is, for people and for `shardforge train RUN_DIR/recipe.yaml`."""
    recipe = loaded.recipe
    for stale in (run_dir.stopped, run_dir.failure):
        with suppress(FileNotFoundError):
            stale.unlink()
    write_whole(run_dir.recipe, dump(recipe).encode())
    origins = {field: str(origin) for field, origin in loaded.origins.items()}
    write_whole(run_dir.origins, json.dumps(origins, indent=1).encode() + b"\n")
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    entry = provenance.start(
        recipe_hash=content_hash(recipe),
        data=data.fingerprint,
        seed=recipe.seed,
        layout=str(recipe.parallel),
        first_step=step,
        device=f"{world.size} x {name}",
        weights=start.identity(source) if source is not None else None,
        attempt=told,
    )
    provenance.append(run_dir.provenance, entry)
    for line in summary(recipe.parallel, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))) if world.size > 1 else ():
        log.info("%s", line)
    log.info("run directory %s, layout %s, %s", run_dir.path, recipe.parallel, units.count(data.samples) + " samples")
