"""How many jobs one after another a run needs: steps that are left, seconds of a step, and what a walltime leaves."""

from __future__ import annotations

import math
import re
import statistics
from collections import deque

from shardforge.checkpoint.folders import committed
from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.data.sizes import BatchSizes
from shardforge.launch.cluster import seconds
from shardforge.launch.job import SPARE_S, Job
from shardforge.observe.jsonl import Tail
from shardforge.recipe.schema import TrainConfig

MOST = 500
"""Jobs of one chain; more say that a number is wrong."""
SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
BUDGET = re.compile(r"([\d_]+(?:\.\d+)?(?:e\d+)?)([kmbgt]?)", re.IGNORECASE)


def tokens(text: str) -> int:
    """A budget as people write it: 15_000_000_000, 15e9, 15B, 1.5T. LaunchError for anything else."""
    match = BUDGET.fullmatch(text.strip())
    if match is None:
        raise LaunchError(f"{text!r} is no number of tokens", "--until", "write 15_000_000_000, 15e9, 15B or 1.5T")
    return round(float(match[1].replace("_", "")) * SUFFIX[match[2].lower()])


def steps_of(budget: int, train: TrainConfig) -> int:
    """Steps after which a run has read `budget` tokens, a growing batch counted."""
    sizes, low, high = BatchSizes.of(train), 0, 1
    while sizes.before(high) * train.seq_len < budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sizes.before(middle) * train.seq_len < budget else (low, middle)
    return high


def step_seconds(run: RunDir) -> float | None:
    """Median wall time of the newest 100 steps of a run, checkpoints included; None before it has any."""
    if not run.metrics.is_file():
        return None
    events = (event for event in Tail(run.metrics).new() if event["event"] == "step")
    newest = [event["seconds"] for event in deque(events, maxlen=100)]
    return statistics.median(newest) if newest else None


def usable_seconds(job: Job) -> int:
    """What one job's walltime leaves for steps."""
    queue = job.cluster.config.queue
    return seconds(job.walltime) - queue.startup_s - queue.lead_s - SPARE_S


def length(job: Job, given_s: float | None) -> int:
    """Jobs until the last step of the run. `given_s` is the time of a step; without it the run has to have some.

    LaunchError when nothing is known of a step, or when the chain would be longer than `MOST`.
    """
    run = job.runs[0]
    each = given_s or step_seconds(run)
    if each is None:
        what = "how many jobs the budget takes follows from the time of a step, and this run has none yet"
        fix = "--step-seconds S (`shardforge plan --schedule` estimates it), or --jobs N, or run one job first"
        raise LaunchError(what, run.metrics, fix)
    done = max(committed(run.checkpoints), default=0)
    left = max(0, job.recipe.train.steps - done)
    count = max(1, math.ceil(left * each / usable_seconds(job)))
    if count > MOST:
        what = f"{left} steps of {each:.3g} s in jobs of {job.walltime} would be {count} jobs, more than {MOST}"
        raise LaunchError(what, "--until", "a longer --walltime, more nodes, or --jobs N for a part of it")
    return count
