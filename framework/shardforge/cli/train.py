"""`shardforge train`: start a run, or go on with one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardforge.recipe.load import Loaded

HELP = "train a recipe: starts the run, or resumes it from its last checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a shipped recipe, a YAML file, or a run directory")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets", help="change a field")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch's import: a lost rank is one message of ours
    from shardforge.recipe.load import load

    loaded = load(args.recipe, args.sets)
    return begin(loaded, ["train", args.recipe, *(word for text in args.sets for word in ("--set", text))])


def begin(loaded: Loaded, words: Sequence[str]) -> int:
    """This process as a rank of the run, or the launcher of all its ranks, each of which does `shardforge WORDS`."""
    from shardforge.train.run import check_place
    from shardforge.train.world import distributed

    if not distributed():
        check_place(loaded)  # before a file is written where it may not belong
    if distributed() or loaded.recipe.parallel.world_size == 1:
        from shardforge.train.main import main

        return main(loaded)
    return several(loaded, words)


def several(loaded: Loaded, words: Sequence[str]) -> int:
    """As many local processes as the layout has ranks; what one process can check is checked first."""
    from shardforge.data.loader import Loader
    from shardforge.engine.fit import check_recipe
    from shardforge.launch.local import launch
    from shardforge.train import start
    from shardforge.train.run import directory, own

    recipe = loaded.recipe
    check_recipe(recipe)
    Loader(recipe.data, recipe.train, recipe.seed, vocab=recipe.model.vocab).close()
    start.find(recipe, directory(recipe))
    own(directory(recipe)).close()  # a living run is found here, not by the ranks; the first of them takes the lock
    return launch(words, recipe.parallel.world_size, directory(recipe))
