"""One rank from start to exit code."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from shardforge.core import log
from shardforge.recipe.load import Loaded
from shardforge.train import guard
from shardforge.train.loop import train
from shardforge.train.run import directory, open_run
from shardforge.train.world import distributed, join


def main(loaded: Loaded) -> int:
    """Exit code of this rank: 0 when the run finished or stopped with everything saved (see RunDir.stopped)."""
    log.setup()
    run_dir = directory(loaded.recipe)

    def work() -> int:
        run = open_run(loaded, join(loaded.recipe.parallel))
        if run.step >= loaded.recipe.train.steps:
            log.logger("train").info("all %d steps are done already", run.step)
        try:
            train(run)
        except BaseException:
            run.audience.on_end("failed")
            raise
        return 0

    code = guard.guarded(run_dir, loaded.recipe.parallel, work)
    if code and distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread may wait for a rank that is gone; nothing of value is left to do
    if dist.is_initialized():
        dist.destroy_process_group()
    return code
