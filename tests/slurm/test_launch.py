"""A run on a cluster is the run on one machine: the same losses to the last bit, however its ranks were started."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.faults import runs
from tests.slurm import jobs
from tests.slurm.jobs import Job

pytestmark = pytest.mark.slurm

CASES = {
    "dense-dp4-srun-4-nodes": ("srun", 4, {"parallel": {"dp_shard": 4}}),
    "mixture-ep4-torchrun-4-nodes": ("torchrun", 4, {"parallel": {"dp_shard": 4, "ep": 4}, "model": jobs.mixture()}),
    "mixture-ep2-srun-1-node": ("srun", 1, {"parallel": {"dp_shard": 2, "ep": 2}, "model": jobs.mixture()}),
    "dense-dp2-torchrun-1-node": ("torchrun", 1, {"parallel": {"dp_shard": 2}}),
}


@dataclass
class Done:
    job: Job
    nodes: int
    slurm: dict[str, str]
    alone: dict[int, tuple[float, float]]


@pytest.fixture(scope="module", params=CASES, ids=str)
def done(request, lab, ranks, tmp_path_factory) -> Done:
    style, nodes, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp("launch")
    job = jobs.launch(lab, jobs.recipe(folder, **changes), "--nodes", str(nodes), "--style", style)
    slurm = job.over()
    local = jobs.recipe(folder / "local", **changes)
    ranks(changes["parallel"]["dp_shard"]).run(runs.turn, local)
    return Done(job, nodes, slurm, runs.losses(folder / "local" / "run"))


def test_the_losses_are_those_of_the_local_run_to_the_last_bit(done):
    assert (done.slurm["JobState"], done.slurm["ExitCode"]) == ("COMPLETED", "0:0"), done.job.told()
    assert len(done.alone) == runs.STEPS
    assert runs.losses(done.job.run_dir) == done.alone


def test_the_run_directory_tells_the_job_its_nodes_and_how_it_ended(done):
    [submitted], [begun], [ended] = (
        jobs.lines(done.job.run_dir / "launch" / "jobs.jsonl"),
        done.job.attempts("begin"),
        done.job.attempts("end"),
    )
    assert submitted["job"] == begun["job"] == done.job.number
    assert begun["nodes"] == done.job.lab.ask("scontrol", "show", "hostnames", done.slurm["NodeList"]).split()
    assert len(begun["nodes"]) == done.nodes
    assert (ended["outcome"], ended["step"]) == ("finished", runs.STEPS)
