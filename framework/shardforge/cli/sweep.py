"""`shardforge sweep`: several runs from one file, one after another, and a report that lays them over each other."""

from __future__ import annotations

import argparse
import os

HELP = "train the arms of a sweep one after another, resume them, and overlay them in one report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", help="a YAML file with arms, or the name of one in recipes/")
    parser.add_argument("--arm", help="run this arm alone, here; several can run at once on different machines")
    parser.add_argument("--report", action="store_true", help="run nothing; write the report of what is there")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets", help="change a field of every arm"
    )


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch's import: a lost rank is one message of ours
    from shardforge.core import log
    from shardforge.core.errors import RecipeError, suggest
    from shardforge.recipe.sweep import load_sweep

    loaded = load_sweep(args.sweep, args.sets)
    changes = [word for text in args.sets for word in ("--set", text)]
    if args.arm is not None:
        if args.arm not in loaded.arms:
            raise RecipeError(f"no arm is called {args.arm!r}", args.sweep, suggest(args.arm, loaded.arms))
        from shardforge.cli.train import begin

        return begin(loaded.arms[args.arm], ["sweep", args.sweep, "--arm", args.arm, *changes])
    from shardforge.train import sweep

    log.setup()
    if args.report:
        written = sweep.overlay(loaded)
        print(f"report   {written}" if written else "no arm has begun")
        return 0
    sweep.check(loaded)
    return sweep.run(loaded, lambda arm: ["sweep", args.sweep, "--arm", arm, *changes])
