"""What a run needs of its nodes: written when the job is submitted, read by the preflight on the first node."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.recipe.schema import Recipe

FILE = "preflight.json"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    nodes: int  # that training takes
    gpus: int = 0  # of each node
    data: tuple[str, ...] = ()  # folders of the corpora
    checkpoint_every: int = 0  # steps
    lead_s: float = 0.0  # from the signal that asks for the last save to the end of the job
    config: PreflightConfig = field(default_factory=PreflightConfig)

    @property
    def checks_gpus(self) -> bool:
        return self.gpus > 0 and self.config.gpus == "checked"


def of(recipe: Recipe, config: PreflightConfig, *, nodes: int, gpus: int = 0, lead_s: float = 0.0) -> Wanted:
    """What training `recipe` on `nodes` nodes of `gpus` GPUs needs; spare nodes are not counted."""
    return Wanted(
        nodes=nodes,
        gpus=gpus,
        data=tuple(str(Path(source.path).absolute()) for source in recipe.data.sources),
        checkpoint_every=recipe.checkpoint.every,
        lead_s=lead_s,
        config=config,
    )


def path(run_dir: RunDir) -> Path:
    return run_dir.launch / FILE


def write(wanted: Wanted, run_dir: RunDir) -> Path:
    """RUN/launch/preflight.json comes back, written."""
    target = path(run_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(dataclasses.asdict(wanted), indent=1) + "\n")
    return target


def read(run_dir: RunDir) -> Wanted:
    """LaunchError when the file is missing, or is not what this version writes."""
    source, fix = path(run_dir), "submit the run again: `shardforge launch` writes this file"
    try:
        return from_plain(json.loads(source.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as cause:
        raise LaunchError(f"what the preflight checks cannot be read: {cause}", source, fix) from cause


def from_plain(told: dict[str, Any]) -> Wanted:
    return Wanted(**{**told, "data": tuple(told["data"]), "config": PreflightConfig(**told["config"])})
