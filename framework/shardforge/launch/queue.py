"""What Slurm says of jobs, and what it is asked to do with them.

Only squeue and scontrol are needed, in formats that every version from 22.05 on prints; sacct is asked where it works.
squeue forgets a job some minutes after its end (MinJobAge).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardforge.core.errors import LaunchError

PATIENCE_S = 30
FIELDS = "%i|%F|%K|%A|%T|%r|%D|%N|%P|%S|%e|%L|%l|%E|%u|%j"
"""Of squeue. The name of the job is the last, for it may have anything in it."""
RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
HELD = ("JobHeldUser", "JobHeldAdmin", "job requeued in held state")
UNKNOWN = ("", "N/A", "(null)", "None", "Unknown", "NONE")
AT_ONCE = 200
"""Jobs in one question."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, or one element of an array, as squeue sees it. Times are seconds since 1970, None when not known."""

    id: str  # 4711, 4711_3, or 4711_[3-9%2] for elements that wait
    array: str  # of the array, or the job's own
    index: str = ""  # in the array; 3-9%2 for elements that wait
    number: str  # SLURM_JOB_ID; of elements that wait, the array's
    state: str
    reason: str = ""  # why it waits, or ended
    nodes: int = 0
    node_list: str = ""
    partition: str = ""
    start: float | None = None  # expected while it waits
    end: float | None = None
    left_s: float | None = None  # of its time limit
    limit_s: float | None = None
    dependency: str = ""
    user: str = ""
    name: str = ""

    @property
    def runs(self) -> bool:
        return self.state in RUNNING

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def held(self) -> bool:
        return self.waits and (self.state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or self.reason in HELD)

    def stands_for(self, wanted: str) -> bool:
        """Whether `wanted` is this job, or is among these elements."""
        array, _, index = wanted.partition("_")
        if wanted in (self.id, self.number):
            return True
        return bool(index) and array == self.array and index.isdecimal() and int(index) in indices(self.index)


def present() -> bool:
    """Whether this machine can ask a Slurm."""
    return shutil.which("squeue") is not None


def jobs(wanted: Collection[str]) -> dict[str, Job]:
    """The jobs that squeue still knows, by the id that was asked for: 4711 or 4711_3.

    LaunchError when squeue is missing, does not answer, or fails.
    """
    ids = sorted({each.partition("_")[0] for each in wanted})
    known: list[Job] = []
    for at in range(0, len(ids), AT_ONCE):
        words = ["squeue", "-h", "-a", "-t", "all", "-o", FIELDS, "-j", ",".join(ids[at : at + AT_ONCE])]
        answer = ask(words)
        if answer.returncode == 0:
            known += parse(answer.stdout)
        elif "Invalid job id" not in answer.stderr:  # that says of a single job that it is forgotten
            raise failed(answer)
    found = ((each, next((job for job in known if job.stands_for(each)), None)) for each in wanted)
    return {each: job for each, job in found if job is not None}


def parse(text: str) -> list[Job]:
    """The jobs in an answer of squeue in the format FIELDS."""
    return [_job(line.split("|", FIELDS.count("|"))) for line in text.splitlines() if line.count("|") >= 15]


def _job(cells: Sequence[str]) -> Job:
    at = dict(zip(re.findall(r"%(\w)", FIELDS), cells, strict=True))
    return Job(
        id=at["i"],
        array=at["F"],
        index=known(at["K"]),
        number=at["A"],
        state=at["T"],
        reason=known(at["r"]),
        nodes=int(at["D"].partition("-")[0] or 0),
        node_list=known(at["N"]),
        partition=at["P"],
        start=moment(at["S"]),
        end=moment(at["e"]),
        left_s=duration(at["L"]),
        limit_s=duration(at["l"]),
        dependency=known(at["E"]),
        user=at["u"],
        name=at["j"],
    )


def known(text: str) -> str:
    return "" if text.strip() in UNKNOWN else text.strip()


def moment(text: str) -> float | None:
    """Slurm's 2026-11-22T21:14:35, in the local zone, as seconds since 1970."""
    try:
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def duration(text: str) -> float | None:
    """Slurm's 1-02:03:04, 2:03:04 or 3:04 in seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def indices(text: str) -> set[int]:
    """The elements in 3-4,7,10-20:5%1."""
    found: set[int] = set()
    for part in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
        if match:
            first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            found |= set(range(first, last + 1, max(1, step)))
    return found


def details(job: str) -> list[dict[str, str]]:
    """What `scontrol show job` says, a dictionary for each element of an array; empty for a forgotten job."""
    answer = ask(["scontrol", "-o", "show", "job", job])
    if answer.returncode:
        if "Invalid job id" in answer.stderr:
            return []
        raise failed(answer)
    return [dict(pairs(line)) for line in answer.stdout.splitlines() if line.startswith("JobId=")]


def pairs(line: str) -> Iterator[tuple[str, str]]:
    """Key and value of each Key=Value of scontrol; values may have spaces."""
    parts = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", line)
    for key, value in zip(parts[1::2], parts[2::2], strict=True):
        yield key, value.strip()


def ended(wanted: Collection[str]) -> dict[str, str]:
    """The last state that the accounting database has of each job, where there is one: "CANCELLED by 0"."""
    if not wanted or shutil.which("sacct") is None:
        return {}
    words = ["sacct", "-D", "-X", "-P", "-n", "-o", "JobID,State", "-j", ",".join(sorted(wanted))]
    try:
        answer = ask(words)
    except LaunchError:
        return {}
    if answer.returncode:  # without a database it says so
        return {}
    lines = (line.partition("|") for line in answer.stdout.splitlines())
    return {job: state for job, _, state in lines if job in wanted}  # each start is a line, the last is the newest


def cancel(wanted: Iterable[str]) -> None:
    """Take jobs out of the queue, or end them. LaunchError when Slurm refuses."""
    _do(["scancel", *wanted])


def requeue(job: str) -> None:
    _do(["scontrol", "requeue", job])


def release(job: str) -> None:
    _do(["scontrol", "release", job])


def submit(script: Path, words: Sequence[str] = ()) -> str:
    """Submit a script as it is; the id of the job."""
    answer = ask(["sbatch", "--parsable", *words, str(script)])
    if answer.returncode or not answer.stdout.strip():
        raise failed(answer)
    return answer.stdout.strip().splitlines()[-1].partition(";")[0]


def _do(words: Sequence[str]) -> None:
    answer = ask(words)
    if answer.returncode:
        raise failed(answer)


def ask(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs. LaunchError when it is not here or does not answer."""
    program = shutil.which(words[0])
    if program is None:
        raise LaunchError(f"there is no {words[0]} on this machine", "PATH", "ask on a login node of the cluster")
    try:
        return subprocess.run(
            [program, *words[1:]], capture_output=True, text=True, timeout=PATIENCE_S, env=environment(os.environ)
        )
    except subprocess.TimeoutExpired:
        what = f"{words[0]} has not answered in {PATIENCE_S} s"
        raise LaunchError(what, "", "is the controller up? `scontrol ping` tells") from None


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment without what changes the output of Slurm's programs."""
    kept = {name: value for name, value in given.items() if not name.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    return kept | {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}


def failed(answer: subprocess.CompletedProcess[str]) -> LaunchError:
    said = "; ".join(dict.fromkeys(line.strip() for line in answer.stderr.splitlines() if line.strip()))
    program, *words = answer.args
    told = " ".join([Path(program).name, *words])
    return LaunchError(f"{said or f'exit code {answer.returncode}'}", told, "`scontrol ping` tells whether Slurm is up")
