"""`shardforge preflight`: is this machine fit for a run? The checks that a cluster job makes of all its nodes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardforge.launch.preflight_wanted import Wanted

HELP = "check this machine as a job checks its nodes: GPUs, versions, memory, disk, corpora, bandwidth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="recipe or run directory whose corpora and run directory are checked")
    parser.add_argument("--cluster", metavar="NAME", help="profile that says what is asked; else the GPUs here")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets", help="change a field")


def run(args: argparse.Namespace) -> int:
    """Exit code as of a job: 0 fit, 3 something of this machine is not, 4 no other machine would repair it."""
    from shardforge.core.rundir import RunDir
    from shardforge.launch.preflight import alone

    wanted, path = _wanted(args)
    report = alone(wanted, RunDir(path))
    for line in report.lines():
        print(line)
    return report.verdict.code


def _wanted(args: argparse.Namespace) -> tuple[Wanted, Path]:
    """What is asked of this machine, and the run directory."""
    from shardforge.launch import cluster, preflight_facts, preflight_wanted
    from shardforge.launch.preflight_config import PreflightConfig
    from shardforge.recipe.load import load

    profile = cluster.load(args.cluster).config if args.cluster else None
    config = (profile.preflight if profile else None) or PreflightConfig()
    gpus = profile.node.gpus if profile else len(preflight_facts.gpus()[0])
    if args.recipe is None:
        return preflight_wanted.Wanted(nodes=1, gpus=gpus, config=config), Path.cwd()
    recipe = load(args.recipe, args.sets).recipe
    wanted = preflight_wanted.of(recipe, config, nodes=1, gpus=gpus)
    return wanted, Path(recipe.run_dir or f"runs/{recipe.name}").absolute()
