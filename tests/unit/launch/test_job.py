from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardforge.core.errors import Problems
from shardforge.launch import cluster
from shardforge.launch.job import Job, Wishes, idle_words, plan
from tests.tiny import tiny

HOME = Path("/shared/ada")


def job(profile: str = "8xh100", sets: tuple[str, ...] = (), ranks: int = 16, **changes: Any) -> Job:
    wishes = {name: changes.pop(name) for name in ("nodes", "walltime", "style") if name in changes}
    recipe = tiny(parallel={"dp_shard": ranks}, train={"steps": 2, "sequences": ranks, "seq_len": 16}, **changes)
    return plan({"tiny": recipe}, cluster.load(profile, sets), Wishes(**wishes), name="tiny", folder=HOME)


def refusal(*args: Any, **changes: Any) -> str:
    with pytest.raises(Problems) as error:
        job(*args, **changes)
    return str(error.value)


def test_a_job_takes_as_few_nodes_as_the_layout_fits_on():
    assert (job().nodes, job().ranks) == (2, 8)


def test_a_layout_smaller_than_a_node_takes_a_part_of_it():
    made = job("1xh200", ranks=2)
    assert (made.nodes, made.ranks, made.gpus) == (1, 2, 2)


def test_more_nodes_than_needed_leave_gpus_idle_and_that_is_said():
    assert idle_words(job(nodes=4)) == "4 of 8 GPUs of each node stay idle"


def test_nodes_that_do_not_fit_the_layout_are_refused_with_both_numbers():
    said = refusal(nodes=3)
    assert "3 nodes x 8 ranks = 24, and the layout dp16 has 16 ranks" in said
    assert "--nodes 2, or --set parallel.dp_shard=24 fills 3 nodes" in said


def test_more_nodes_than_the_profile_allows_point_to_its_line():
    said = refusal("1xh200", nodes=2)
    assert "1xh200.yaml:3:" in said and "more than the 1 that a job may have" in said


@pytest.mark.parametrize("walltime", ["00:15:00", "00:16:00"])
def test_a_walltime_that_leaves_no_step_is_refused(walltime: str):
    assert "no step would be trained" in refusal(walltime=walltime)


def test_a_walltime_that_leaves_a_minute_is_taken():
    assert job(walltime="00:17:00").walltime == "00:17:00"


def test_a_walltime_that_is_none_is_refused():
    assert "--walltime  'tomorrow' is no time that Slurm reads" in refusal(walltime="tomorrow")


def test_a_run_directory_on_a_disk_of_one_node_is_refused():
    said = refusal(run_dir="/dev/shm/run")
    assert "is below /dev/shm, which every node of 8xh100 has for itself" in said and "storage.shared" in said


def test_a_shared_folder_below_a_local_one_is_taken():
    assert job(sets=("storage.shared=[/dev/shm/shared]",), run_dir="/dev/shm/shared/run").runs[0].path == Path(
        "/dev/shm/shared/run"
    )


def test_everything_that_is_wrong_comes_at_once():
    assert refusal(nodes=3, walltime="1", run_dir="/dev/shm/run").startswith("3 problems in launching tiny on 8xh100")


def test_a_relative_run_directory_begins_where_sbatch_is_called():
    assert job().runs[0].path == HOME / "runs" / "tiny"


def test_two_runs_of_one_name_in_two_places_have_jobs_of_two_names():
    assert job().name != job(run_dir="/shared/bob/runs/tiny").name


def test_arms_of_different_sizes_cannot_be_one_array():
    sizes = {str(n): tiny(parallel={"dp_shard": n}) for n in (2, 4)}
    with pytest.raises(Problems, match="arms need different: 2 2, 4 4 ranks"):
        plan(sizes, cluster.load("cpu"), Wishes(), name="sweep", folder=HOME, array=True)
