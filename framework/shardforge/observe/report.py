"""Writes report.html, loss.png and, of mixtures, experts.png for run directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shardforge.core.errors import DataError, ForgeError, Problems
from shardforge.core.rundir import RunDir
from shardforge.observe import expert_plots, page, plots
from shardforge.observe.history import History
from shardforge.observe.jsonl import read


def write(paths: Sequence[Path], output: Path | None = None) -> tuple[Path, ...]:
    """The report, the picture of the loss and, where a run has experts, that of their use; where they were written.

    They stand in the first run directory, or at `output` (an .html file) with the pictures beside it under its name.
    Every directory that is no run is a DataError, all reported together.
    """
    runs = [RunDir(path) for path in paths]
    histories = _histories(runs)
    report = output or runs[0].report
    picture = output.with_suffix(".png") if output else runs[0].plot
    text = page.html(
        histories,
        [_recipe(run) for run in runs],
        [_provenance(run) for run in runs],
        [run.samples.read_text(encoding="utf-8", errors="replace") if run.samples.exists() else "" for run in runs],
    )
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(text, encoding="utf-8")
    plots.loss_png(picture, histories)
    mixtures = [history for history in histories if history.experts]
    if not mixtures:
        return report, picture
    of_experts = output.with_name(f"{output.stem}-experts.png") if output else runs[0].experts_plot
    expert_plots.experts_png(of_experts, mixtures)
    return report, picture, of_experts


def check(run: RunDir) -> None:
    """DataError unless `run` is the directory of a run that has written metrics."""
    if not run.path.is_dir():
        raise DataError("there is no such run directory", run.path, "name the folder of a run, like runs/first")
    if not run.metrics.is_file():
        raise DataError(
            f"this is not a run directory: it has no {run.metrics.name}",
            run.path,
            "name the folder that `shardforge train` printed when it started",
        )


def _histories(runs: Sequence[RunDir]) -> list[History]:
    problems: list[ForgeError] = []
    histories = []
    for run in runs:
        try:
            check(run)
            histories.append(read(run.metrics))
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems, "the run directories")
    return histories


def _recipe(run: RunDir) -> dict[str, Any]:
    return yaml.safe_load(run.recipe.read_text(encoding="utf-8")) or {} if run.recipe.exists() else {}


def _provenance(run: RunDir) -> Any:
    return json.loads(run.provenance.read_text(encoding="utf-8")) if run.provenance.exists() else None
