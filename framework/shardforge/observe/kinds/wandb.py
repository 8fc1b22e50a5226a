"""Weights & Biases, online or into files that `wandb sync` sends later.

Paper: none.
Changes: nothing in the run.
Cost: a second at the start; then a process of its own takes what each step hands over.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from shardforge.core.errors import LaunchError
from shardforge.core.log import logger
from shardforge.core.optional import require
from shardforge.core.options import option
from shardforge.core.rundir import RunDir
from shardforge.core.slots import observers
from shardforge.observe import scalars
from shardforge.observe.base import EvalReport, RunInfo, StepReport


@observers.register("wandb")
@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    project: str = option("shardforge", "project that the run appears in")
    entity: str | None = option(None, "user or team; empty takes the account's own")
    group: str | None = option(None, "name that several runs share")
    mode: Literal["online", "offline", "disabled"] = option(
        "online", "online: sent as it happens; offline: files for `wandb sync`; disabled: nothing is kept"
    )

    def build(self) -> Wandb:
        return Wandb(self, require("wandb", for_="the wandb observer", extra="wandb", field="observe"))


class Wandb:
    """Charts run over the step. wandb's own counter only goes forward, a resumed run may go back; so it is not used."""

    def __init__(self, cfg: WandbConfig, wandb: ModuleType):
        self._cfg, self._wandb = cfg, wandb
        self._run: Any = None

    def on_start(self, info: RunInfo) -> None:
        folder = RunDir(info.path).wandb
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"layout": info.layout, "world_size": info.world_size, "weights": info.weights}
        try:
            self._run = self._wandb.init(
                project=self._cfg.project,
                entity=self._cfg.entity,
                group=self._cfg.group,
                mode=self._cfg.mode,
                name=info.name,
                id=_id(folder),
                resume="allow",
                dir=str(info.path),  # wandb puts its own folder named wandb inside
                config={**info.recipe, "run": facts},
                settings=self._wandb.Settings(
                    console="off", silent=True, use_dot_wandb=False, disable_git=True, disable_code=True
                ),
            )
        except self._wandb.errors.Error as cause:
            raise LaunchError(
                f"wandb does not start: {cause}", "observe", "run `wandb login` once, or set mode: offline"
            ) from cause
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        logger("observe").info("wandb: %s", self._run.url or folder)

    def on_step(self, report: StepReport) -> None:
        self._run.log({"step": report.step, **scalars.of_step(report)})

    def on_eval(self, report: EvalReport) -> None:
        self._run.log({"step": report.step, **scalars.of_eval(report)})

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._run.summary["checkpoint"] = step

    def on_end(self, verdict: str) -> None:
        if self._run is not None:
            self._run.summary["verdict"] = verdict
            self._run.finish(exit_code=1 if verdict == "failed" else 0)
            self._run = None


def _id(folder: Path) -> str:
    """The run's id, made at the first start and kept beside wandb's files, so that a resumed run goes on."""
    path = folder / "id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()
