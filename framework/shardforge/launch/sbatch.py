"""The batch script of a job, from slurm/job.sbatch.j2 and the lines of slurm/env."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import shardforge
from shardforge.core.errors import LaunchError, suggest
from shardforge.launch.environment import quoted, words
from shardforge.launch.job import Job, options

TEMPLATE = "job.sbatch.j2"


def shipped() -> Path:
    """The folder of the templates that come with ShardForge: in the installed package, or in the clone."""
    package = Path(shardforge.__file__).parent
    inside = package / "_slurm"
    return inside if inside.is_dir() else package.parent.parent / "slurm"


def render(job: Job) -> str:
    """The whole script. LaunchError for a file of slurm/env that does not exist."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(shipped()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # bash writes {# itself, in ${#NAME[@]}
        comment_end_string="##}",
    )
    return templates.get_template(TEMPLATE).render(values(job))


def values(job: Job) -> dict[str, Any]:
    """What the template is filled with."""
    config = job.cluster.config
    environment, queue, preflight = config.environment, config.queue, config.preflight
    folders = [str(job.folder), *(str(run.path) for run in job.runs if not run.path.is_relative_to(job.folder))]
    first, last = config.network.ports
    return {
        "options": header(job),
        "title": f"{job.name}: {job.layout}, {job.nodes} nodes x {job.ranks} ranks, cluster {job.cluster.name}",
        "run": words(str(job.runs[0].path)),
        "arms": [words(str(run.path)) for run in job.runs] if job.array else [],
        "nodes": job.nodes,
        "ranks": job.ranks,
        "spares": queue.spares,
        "spare_words": f"; {queue.spares} more can replace one" if queue.spares else "",
        "style": job.style,
        "chain": job.chained,
        "first_port": first,
        "ports": last - first,
        "inside": config.restarts.inside,
        "lead_s": queue.lead_s,
        "setup": environment.setup(),
        "env_files": [(Path(file).stem, lines(job, file)) for file in config.network.files],
        "variables": [
            (name, quoted(each.value), " ".join(each.reason.split())) for name, each in config.network.variables.items()
        ],
        "scratch": f'"{config.storage.scratch}"' if config.storage.scratch else "",
        "container": environment.container(folders),
        "here": environment.here(),
        "prefix": environment.prefix and f"{environment.prefix} ",
        "step_options": environment.step and f" {environment.step}",
        "python": words(environment.python),
        "python_inside": _inside(environment.python),
        "rank_cpus": job.rank_cpus,
        "node_cpus": job.rank_cpus * job.ranks,
        "preflight": preflight is not None,
        "preflight_limit_s": int(3 * preflight.patience_s + 60) if preflight else 0,
    }


def _inside(python: str) -> str:
    """The interpreter within a text that stands in single quotes."""
    return words(python).replace("'", "'\\''")


def header(job: Job) -> list[str]:
    """Options of sbatch, one a line of the script."""
    queue, node = job.cluster.config.queue, job.cluster.config.node
    logs = job.home.logs
    log = str(logs / ("job-%A_%a.log" if job.array else "job-%j.log"))
    given = {
        "job-name": job.name,
        "nodes": str(job.nodes + queue.spares),
        "ntasks-per-node": str(job.ranks),
        "cpus-per-task": str(job.rank_cpus),
        **gpu_request(job),
        "time": job.walltime,
        "signal": f"B:USR1@{queue.lead_s}",
        "output": log,
        "open-mode": "append",
        "chdir": str(job.folder),
        "mem": "0" if node.memory_gb is None else f"{round(node.memory_gb * 1024)}M",
    }
    named = {name: getattr(queue, name) for name in ("partition", "account", "qos", "reservation", "constraint")}
    given |= {name: value for name, value in named.items() if value}
    if queue.exclude:
        given["exclude"] = ",".join(queue.exclude)
    if queue.switches:
        given["switches"] = f"{queue.switches}@{queue.switches_wait}"
    flags = {"requeue": ""} | ({"exclusive": ""} if node.exclusive else {}) | ({"no-kill": ""} if queue.spares else {})
    if job.array:
        given["array"] = f"0-{len(job.runs) - 1}"
    return [_quoted(option) for option in options(given | flags | dict(queue.options))]


def gpu_request(job: Job) -> dict[str, str]:
    node = job.cluster.config.node
    if not job.gpus:
        return {}
    kind = f"{node.gpu_type}:" if node.gpu_type else ""
    if node.gpu_request == "gres":
        return {"gres": f"gpu:{kind}{job.gpus}"}
    return {"gpus-per-node": f"{kind}{job.gpus}"}


def _quoted(option: str) -> str:
    """sbatch splits a line at spaces, and takes quotes away."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if any(c.isspace() for c in value) or "#" in value else option


def lines(job: Job, file: str) -> list[str]:
    """The lines of a file of slurm/env, or of a path of the user's own."""
    folder = shipped() / "env"
    path = Path(file) if file.endswith(".sh") else folder / f"{file}.sh"
    if not path.is_file():
        what = f"there are no lines of environment called {file!r}"
        known = [each.stem for each in folder.glob("*.sh")]
        raise LaunchError(what, job.cluster.where("network.files"), suggest(file, known))
    return path.read_text().splitlines()
