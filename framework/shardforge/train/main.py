"""One rank from start to exit code."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import torch.distributed as dist

from shardforge.core import log
from shardforge.core.rundir import RunDir
from shardforge.recipe.load import Loaded
from shardforge.train import guard
from shardforge.train.failure import MISTAKE, Failure
from shardforge.train.lock import Lease
from shardforge.train.loop import train
from shardforge.train.pulse import Heart, leave
from shardforge.train.run import directory, open_run
from shardforge.train.world import distributed, join, limit


def main(loaded: Loaded) -> int:
    """Exit code of this rank: 0 when the run finished or stopped with everything saved (see RunDir.stopped)."""
    log.setup()
    recipe = loaded.recipe
    run_dir, timeout = directory(recipe), recipe.train.timeout
    heart = Heart(run_dir, recipe.parallel, timeout)
    held: list[Lease] = []

    def work() -> int:
        world = join(recipe.parallel, timeout)
        if distributed():
            heart.start(dist.distributed_c10d._get_default_store())
        run = open_run(loaded, world)
        if run.held is not None:
            held.append(run.held)
            run.held.lost = lambda holder: evicted(run_dir, heart, str(holder))
        limit(timeout)
        if run.step >= recipe.train.steps:
            log.logger("train").info("all %d steps are done already", run.step)
        try:
            train(run, heart.pace)
        except BaseException:
            run.audience.on_end("failed")
            raise
        return 0

    if distributed():
        signal.signal(signal.SIGTERM, _end)
    code = guard.guarded(run_dir, recipe.parallel, work, heart)
    for lease in held:
        lease.close()
    if code and distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread may wait for a rank that is gone; nothing of value is left to do
    heart.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def evicted(run_dir: RunDir, heart: Heart, holder: str) -> None:
    """The run directory belongs to another run since this process was cut off or stood still: all ranks leave, and
    nothing more is written there."""
    text = f"error: {run_dir.path}  the run directory has changed hands while this run stood still: {holder} has it"
    print(text, file=sys.stderr, flush=True)
    guard.refused(run_dir, holder)
    heart.tell(Failure(text=text, code=MISTAKE, cause="mistake"))
    leave(MISTAKE)


def _end(number: int, frame: FrameType | None) -> None:
    """SIGTERM outside of the loop ends this process, unless it is on its way out already: a launcher that has lost a
    rank sends it to all the others, and one that has met the error of that must be able to say so."""
    if sys.exc_info()[0] is None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
