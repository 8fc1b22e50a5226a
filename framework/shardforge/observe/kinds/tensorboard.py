"""TensorBoard event files.

Paper: none.
Changes: nothing in the run.
Cost: a thread of its own writes what each step hands over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardforge.core.optional import require
from shardforge.core.options import option
from shardforge.core.rundir import RunDir
from shardforge.core.slots import observers
from shardforge.observe import scalars
from shardforge.observe.base import EvalReport, RunInfo, StepReport


@observers.register("tensorboard")
@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    flush_s: int = option(30, "longest time an event waits in memory", unit="seconds", at_least=1)

    def build(self) -> TensorBoard:
        require("tensorboard", for_="the tensorboard observer", extra="tensorboard", field="observe")
        module = require(
            "torch.utils.tensorboard", for_="the tensorboard observer", extra="tensorboard", field="observe"
        )
        return TensorBoard(self, module.SummaryWriter)


class TensorBoard:
    def __init__(self, cfg: TensorBoardConfig, writer: Any):
        self._cfg, self._make = cfg, writer
        self._writer: Any = None

    def on_start(self, info: RunInfo) -> None:
        # a resumed run takes back what an earlier life wrote after first_step
        purge = info.first_step + 1 if info.first_step else None
        self._writer = self._make(
            log_dir=str(RunDir(info.path).tensorboard), purge_step=purge, flush_secs=self._cfg.flush_s
        )

    def on_step(self, report: StepReport) -> None:
        self._write(scalars.of_step(report), report.step)

    def on_eval(self, report: EvalReport) -> None:
        self._write(scalars.of_eval(report), report.step)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._writer.flush()

    def on_end(self, verdict: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
