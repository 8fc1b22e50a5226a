"""The arms of a sweep one after another, each a run that can be stopped and gone on with; then one report of all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shardforge.core.errors import ForgeError, Problems
from shardforge.core.log import logger
from shardforge.core.rundir import RunDir
from shardforge.data.loader import Loader
from shardforge.engine.fit import check_recipe
from shardforge.observe import report
from shardforge.recipe.schema import Recipe
from shardforge.recipe.sweep import Sweep
from shardforge.train import start
from shardforge.train.run import check_same_run, directory
from shardforge.train.signals import ASKING

log = logger("train")

COMMAND = (sys.executable, "-m", "shardforge")


def check(sweep: Sweep) -> None:
    """Problems with any arm that can be known before the first one starts: layout, corpus, weights, a directory that
    belongs to another run."""
    found: list[ForgeError] = []
    for arm in sweep.arms.values():
        recipe = arm.recipe
        for each in (_fits, _reads, _begins, _continues):
            try:
                each(recipe)
            except Problems as many:
                found += many.problems
            except ForgeError as error:
                found.append(error)
    if found:
        raise Problems({str(error): error for error in found}.values(), f"the sweep {sweep.name}")


def _fits(recipe: Recipe) -> None:
    check_recipe(recipe)


def _reads(recipe: Recipe) -> None:
    Loader(recipe.data, recipe.train, recipe.seed, vocab=recipe.model.vocab).close()


def _begins(recipe: Recipe) -> None:
    start.find(recipe, directory(recipe))


def _continues(recipe: Recipe) -> None:
    check_same_run(directory(recipe), recipe)


def finished(recipe: Recipe) -> bool:
    """Whether all steps of a run are done, as its own verdict says."""
    file = directory(recipe).stopped
    verdict = json.loads(file.read_text()) if file.is_file() else {}
    return verdict.get("state") == "finished" and verdict["step"] >= recipe.train.steps


def run(sweep: Sweep, command: Callable[[str], Sequence[str]]) -> int:
    """Every arm that is not finished, in a process of its own: `command` gives the words after `shardforge`.

    An arm that fails does not keep the others from running; a request to stop does. The exit code is 0, or that of the
    first arm that failed. The report of all arms that have metrics is written at the end whatever happened.
    """
    codes: dict[str, int] = {}
    for number, (name, arm) in enumerate(sweep.arms.items(), 1):
        if finished(arm.recipe):
            log.info("arm %s (%d of %d) is finished", name, number, len(sweep.arms))
            continue
        log.info("arm %s (%d of %d)", name, number, len(sweep.arms))
        codes[name], asked = _process(command(name))
        if asked:
            log.info("the sweep was stopped in arm %s; the same command goes on with it", name)
            break
    overlay(sweep)
    failed = {name: code for name, code in codes.items() if code}
    if failed:
        log.warning("failed: %s", ", ".join(f"{name} (exit code {code})" for name, code in failed.items()))
    return next(iter(failed.values()), 0)


def overlay(sweep: Sweep) -> Path | None:
    """Write the report of all arms over each other beside them; None when no arm has metrics yet."""
    runs = [directory(arm.recipe) for arm in sweep.arms.values()]
    begun = [run.path for run in runs if run.metrics.is_file()]
    if not begun:
        return None
    written, *_ = report.write(begun, RunDir(sweep.folder).report)
    log.info("report %s", written)
    return written


def _process(words: Sequence[str]) -> tuple[int, bool]:
    """Exit code of `shardforge WORDS`, and whether a stop was asked for meanwhile, which it is told of."""
    child = subprocess.Popen([*COMMAND, *words], process_group=0)
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in ASKING}
    try:
        return child.wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
