"""From a job to Slurm: checked by sbatch, written down in the run directory, submitted, recorded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch import preflight_wanted
from shardforge.launch.cluster import dump as profile_text
from shardforge.launch.job import Job
from shardforge.recipe.provenance import dump as recipe_text

PATIENCE_S = 60
"""A controller that is busy answers late; one that does not answer for this long is down."""
REFUSALS = (
    ("invalid account", "queue.account", "sacctmgr show associations user=$USER"),
    ("invalid partition", "queue.partition", "sinfo -s lists the partitions"),
    ("invalid qos", "queue.qos", "sacctmgr show associations user=$USER format=account,partition,qos"),
    ("reservation", "queue.reservation", "scontrol show reservation"),
    ("invalid feature", "queue.constraint", "sinfo -o '%N %f' lists the features of the nodes"),
    ("gres|trackable resource", "node.gpus", "sinfo -o '%N %G' lists what nodes have; gpu_type must match"),
    ("memory", "node.memory_gb", "sinfo -o '%N %m' tells the memory of the nodes in MB"),
    ("time limit", "queue.walltime", "sinfo -o '%P %l' lists the limits of the partitions"),
    ("invalid node name", "queue.exclude", "sinfo -N lists the nodes"),
    ("unrecognized option|invalid option", "queue.options", "sbatch --help; --container-... needs pyxis"),
    ("node count|processors|configuration|available", "node", "sinfo -o '%P %D %c %m %G' lists what partitions have"),
)
"""Words of sbatch, the field of the profile that they are about, and where to look."""


SILENT = r"could not establish a configuration|unable to contact slurm|connection (refused|timed out)|munge"
"""Words of an sbatch that has asked nobody."""


class NoController(LaunchError):
    """Slurm's programs are here, and its controller is not."""


@dataclass(frozen=True)
class Submitted:
    job: str  # id
    chain: str = ""  # id of the first job of the chain


def tool(name: str) -> str:
    """The path of one of Slurm's programs; LaunchError when this machine has none."""
    found = shutil.which(name)
    if found is None:
        fix = "run it on a login node of the cluster; --dry-run prints the script anywhere, --cluster local trains here"
        raise LaunchError(f"there is no {name} on this machine, so there is no Slurm to submit to", "PATH", fix)
    return found


def test(job: Job, script: str) -> str:
    """What `sbatch --test-only` says of the script; LaunchError when it refuses. Nothing is submitted."""
    done = _sbatch(["--test-only"], script, job)
    if done.returncode:
        raise refusal(job, done.stderr)
    said = done.stderr.strip().splitlines()
    return said[-1].removeprefix("sbatch: ") if said else "sbatch accepts it"


def refusal(job: Job, words: str) -> LaunchError:
    """What sbatch said, where in the profile it belongs, and how to find out more."""
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in words.strip().splitlines()]
    text = "; ".join(dict.fromkeys(line for line in said if line)) or "no word"
    if re.search(SILENT, text, re.IGNORECASE):
        what = f"Slurm's controller does not answer: {text}"
        return NoController(what, job.cluster.path, "scontrol ping asks it; SLURM_CONF names the cluster's file")
    for pattern, field, fix in REFUSALS:
        if re.search(pattern, text, re.IGNORECASE):
            return LaunchError(f"sbatch refuses the job: {text}", job.cluster.where(field), fix)
    return LaunchError(f"sbatch refuses the job: {text}", job.cluster.path, "--dry-run prints the script")


def write(job: Job, script: str) -> None:
    """What the job reads later: script, recipe and profile, so that no later edit of a file changes a queued job."""
    for run, recipe in zip(job.runs, job.recipes.values(), strict=True):
        run.logs.mkdir(parents=True, exist_ok=True)
        (run.launch / "recipe.yaml").write_text(recipe_text(recipe))
        (run.launch / "cluster.yaml").write_text(profile_text(job.cluster))
        config = job.cluster.config
        if config.preflight is not None:
            wanted = preflight_wanted.of(
                recipe, config.preflight, nodes=job.nodes, gpus=job.gpus, lead_s=config.queue.lead_s
            )
            preflight_wanted.write(wanted, run)
        with suppress(FileNotFoundError):
            run.stop.unlink()  # asking for a start takes an earlier wish to stop back
    job.home.logs.mkdir(parents=True, exist_ok=True)
    for run in {job.home.path: job.home, **{run.path: run for run in job.runs}}.values():
        run.script.write_text(script)


def submit(job: Job, script: str, count: int = 1) -> list[Submitted]:
    """Submit `count` jobs, the later ones waiting for the earlier; LaunchError with what went in when one is refused.

    sbatch has been asked with `test` before: nothing is written for a job that it refuses.
    """
    test(job, script)
    write(job, script)
    done: list[Submitted] = []
    for _ in range(count):
        answer = _sbatch(["--parsable", *_dependency(job, done, count)], script, job)
        if answer.returncode:
            error = refusal(job, answer.stderr)
            told = f"; submitted before: {', '.join(each.job for each in done)}" if done else ""
            raise LaunchError(error.what + told, error.where, error.fix)
        number = answer.stdout.strip().splitlines()[-1].split(";")[0]
        done.append(Submitted(number, done[0].job if done else (number if count > 1 else "")))
        record(job, done[-1])
    return done


def _dependency(job: Job, done: Sequence[Submitted], count: int) -> list[str]:
    if count == 1 and not job.chained:
        return []
    if job.cluster.config.queue.chain == "singleton":
        return ["--dependency=singleton"]
    return [f"--dependency=afterany:{done[-1].job}"] if done else []


def record(job: Job, submitted: Submitted) -> None:
    """One line in jobs.jsonl of the run, or of each run of an array, whose jobs are called ID_0, ID_1 ..."""
    for index, run in enumerate(job.runs):
        entry: dict[str, Any] = {
            "job": f"{submitted.job}_{index}" if job.array else submitted.job,
            "name": job.name,
            "cluster": job.cluster.name,
            "nodes": job.nodes,
            "spares": job.cluster.config.queue.spares,
            "ranks": job.ranks,
            "style": job.style,
            "walltime": job.walltime,
            "time": time.time(),
        }
        if submitted.chain:
            entry["chain"] = submitted.chain
        _append(run, entry)


def _append(run: RunDir, entry: dict[str, Any]) -> None:
    run.launch.mkdir(parents=True, exist_ok=True)
    with run.jobs.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _sbatch(words: Sequence[str], script: str, job: Job) -> subprocess.CompletedProcess[str]:
    command = [tool("sbatch"), *words]
    try:
        return subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=PATIENCE_S, cwd=_existing(job.folder)
        )
    except subprocess.TimeoutExpired:
        what = f"{' '.join(command)} has not answered in {PATIENCE_S} s"
        raise LaunchError(what, job.cluster.path, "is the controller up? scontrol ping tells") from None


def _existing(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None
