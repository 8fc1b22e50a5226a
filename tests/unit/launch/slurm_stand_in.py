"""Slurm's programs for tests: scripts that print what a real Slurm 22.05 printed, and note what they were asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SQUEUE = """\
3|3|N/A|3|CANCELLED|Resources|4||main|2026-11-22T21:04:59|2026-11-22T21:04:59|10:00|10:00|(null)|root|shardforge-b
4|4|N/A|4|PENDING|Dependency|1||main|N/A|N/A|10:00|10:00|singleton(unfulfilled)|root|shardforge-b
5_[2-4%1]|5|2-4%1|5|PENDING|JobArrayTaskLimit|1||main|N/A|N/A|10:00|10:00|(null)|root|arr
6|6|N/A|6|PENDING|JobHeldUser|1||main|N/A|N/A|10:00|10:00|(null)|root|held
9|9|N/A|9|PENDING|job requeued in held state|2||main|2026-11-22T21:05:16|2026-11-22T21:15:16|10:00|10:00|(null)|root|x
7|7|N/A|7|COMPLETING|None|1|node1|main|N/A|N/A|10:00|10:00|(null)|root|shardforge-a
2|2|N/A|2|RUNNING|None|2|node[1-2]|main|2026-11-22T21:05:07|2026-11-22T21:15:07|9:59|1-00:10:00|(null)|root|a|b c
5_1|5|1|8|RUNNING|None|1|node2|main|2026-11-22T21:04:59|2026-11-22T21:14:59|9:51|UNLIMITED|(null)|root|arr
"""
SCONTROL = (
    "JobId=2 JobName=shardforge-a UserId=root(0) GroupId=root(0) MCS_label=N/A Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:02 TimeLimit=00:10:00 TimeMin=N/A SubmitTime=2026-11-22T21:04:34 EligibleTime=2026-11-22T21:04:34 "
    "StartTime=2026-11-22T21:04:35 EndTime=2026-11-22T21:14:35 PreemptTime=2026-11-22T21:10:00 "
    "Scheduler=Main Partition=main AllocNode:Sid=head:0 ReqNodeList=(null) ExcNodeList=node4 NodeList=node[1-2] "
    "BatchHost=node1 NumNodes=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=2,node=2,billing=2 Command=/runs/S/j.sbatch a b "
    "WorkDir=/runs/S Comment=hello world x=1  StdErr=/runs/S/2.out StdIn=/dev/null StdOut=/runs/S/2.out Power= \n"
)
FORGOTTEN = ("", "slurm_load_jobs error: Invalid job id specified", 1)


class Programs:
    """`say` makes a program; `asked` are the words that programs were called with."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "asked"

    def say(self, program: str, out: str = "", err: str = "", code: int = 0) -> None:
        (self.folder / f"{program}.out").write_text(out)
        (self.folder / f"{program}.err").write_text(err + "\n" if err else "")
        script = self.folder / program
        own = f'"{self.folder}/{program}'
        script.write_text(
            f'#!/bin/sh\necho {program} "$@" >> "{self.log}"\ncat {own}.out"\ncat {own}.err" >&2\nexit {code}\n'
        )
        script.chmod(0o755)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """An empty folder of programs in front of those that the shell needs; no real Slurm is found."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for tool in ("sh", "cat"):
        (folder / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(folder))
    assert not os.path.exists(folder / "squeue")
    return Programs(folder)
