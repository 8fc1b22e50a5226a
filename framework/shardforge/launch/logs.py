"""The files in RUN/launch/logs: which of them has what a rank said, and its last lines.

job-JOB.log                       what the batch script said, appended over requeues
START/rank-R.log                  one rank                      (style srun)
START/node-N.log                  all ranks of a node; lines begin with [default<LOCAL_RANK>]:  (style torchrun)
START/preflight-N.log             the checks on a node
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch.history import read
from shardforge.launch.overview import submissions

BLOCK_BYTES = 1 << 16
NUMBER = re.compile(r"(rank|node|job)-(\d+)(?:_(\d+))?\.log")


@dataclass(frozen=True)
class Log:
    path: Path
    local_rank: int | None = None  # whose lines are wanted, of a file that several ranks share

    def wanted(self, line: str) -> str | None:
        """The line without the name of its rank, None when it is another rank's."""
        if self.local_rank is None:
            return line
        mark = re.match(r"\[[^\]\s]*?(\d+)\]:", line)
        return line[mark.end() :] if mark and int(mark[1]) == self.local_rank else None


def find(run: RunDir, rank: int | None = None, start: str | None = None) -> Log:
    """The log of a rank in an attempt (the last one unless `start` says), or of the last job.

    LaunchError when there is none, with those that there are.
    """
    if rank is None and start is None:
        return Log(_newest_job(run))
    folder = _folder(run, start)
    if rank is None:
        raise LaunchError(
            "an attempt has a log for each rank", folder, "name one with --rank; without --start: the job's"
        )
    files = _numbered(folder)
    if ("rank", rank) in files:
        return Log(files["rank", rank])
    if any(kind == "node" for kind, _ in files):
        ranks = next((int(each["ranks"]) for each in reversed(submissions(run)) if each.get("ranks")), 1)
        node, local = divmod(rank, ranks)
        if ("node", node) in files:
            return Log(files["node", node], local)
    known = sorted(number for kind, number in files if kind in ("rank", "node"))
    what = f"there is no log of rank {rank}"
    there = f"{known[0]} to {known[-1]}" if known else "none"
    raise LaunchError(what, folder, f"logs there: {there}; --start names another attempt")


def _newest_job(run: RunDir) -> Path:
    files = [path for path in run.logs.glob("job-*.log") if NUMBER.fullmatch(path.name)]
    files += [path for each in _array_jobs(run) if (path := run.path.parent / "launch" / "logs" / each).is_file()]
    if not files:
        fix = "a run without Slurm prints where it was started; `shardforge watch` attaches to it"
        raise LaunchError("no job of this run has written a log", run.logs, fix)
    return max(files, key=lambda path: path.stat().st_mtime)


def _array_jobs(run: RunDir) -> list[str]:
    """Names of the logs of an array's element, which lie with the array."""
    return [f"job-{each['job']}.log" for each in submissions(run) if "_" in str(each["job"])]


def _folder(run: RunDir, start: str | None) -> Path:
    if start is not None:
        if (run.logs / start).is_dir():
            return run.logs / start
        there = sorted(path.name for path in run.logs.iterdir() if path.is_dir()) if run.logs.is_dir() else []
        raise LaunchError(f"no attempt {start!r} has left logs", run.logs, f"there are: {', '.join(there) or 'none'}")
    begun = [run.logs / each.start for each in reversed(read(run.attempts))]
    folder = next((each for each in begun if each.is_dir()), None)
    if folder is None:
        fix = "logs without --rank prints the job's; a run without Slurm prints where it was started"
        raise LaunchError("no attempt of this run has left logs of its ranks", run.logs, fix)
    return folder


def _numbered(folder: Path) -> dict[tuple[str, int], Path]:
    matches = ((NUMBER.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {(match[1], int(match[2])): path for match, path in matches if match}


def last(log: Log, lines: int) -> tuple[list[str], int]:
    """The last `lines` lines (all for 0), and the byte at which reading goes on."""
    with log.path.open("rb") as file:
        end = position = file.seek(0, 2)
        step, text = BLOCK_BYTES if lines else end, b""
        while position > 0:
            start = max(0, position - step)
            file.seek(start)
            text = file.read(position - start) + text
            position, step = start, 2 * step
            if 0 < lines < len(found := _shown(log, text)):  # more than asked for: the first may be torn
                return found[-lines:], end
    return _shown(log, text)[-lines:], end


def _shown(log: Log, text: bytes) -> list[str]:
    shown = (log.wanted(row) for row in text.decode(errors="replace").splitlines())
    return [row for row in shown if row is not None]


def follow(find_log: Callable[[], Log], log: Log, offset: int, wait: Callable[[], None]) -> Iterator[str]:
    """Whole lines as they come, from byte `offset` of `log` on; also of a later attempt's file. Never ends by itself.

    `wait` is called when there is no news.
    """
    rest = b""
    while True:
        with log.path.open("rb") as file:
            file.seek(offset)
            new = file.read()
        offset += len(new)
        *whole, rest = (rest + new).split(b"\n")
        for raw in whole:
            line = log.wanted(raw.decode(errors="replace"))
            if line is not None:
                yield line
        if new:
            continue
        latest = find_log()
        if latest != log:
            log, offset, rest = latest, 0, b""
            yield f"== {log.path}"
        else:
            wait()
