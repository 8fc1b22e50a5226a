"""The same run without a scheduler: one line for each machine, to be typed there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from shardforge.launch.job import Job


def commands(job: Job, words: Sequence[str]) -> list[str]:
    """torchrun lines of `shardforge WORDS`, one for each node; FIRST stands for the address of the first one."""
    port = job.cluster.config.network.ports[0]
    common = ["torchrun", f"--nproc-per-node={job.ranks}"]
    if job.nodes == 1:
        return [shlex.join([*common, "--standalone", "-m", "shardforge", *words])]
    shared = [f"--nnodes={job.nodes}", "--rdzv-backend=static", "--master-addr=FIRST", f"--master-port={port}"]
    return [
        shlex.join([*common, *shared, f"--node-rank={node}", "-m", "shardforge", *words]) for node in range(job.nodes)
    ]
