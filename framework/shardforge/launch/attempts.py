"""Before an attempt: whether it may begin, and a line in RUN/launch/attempts.jsonl.

    python -m shardforge.launch.attempts begin RUN --start START --job JOB --restart N --try N --nodes a,b,c
                                               [--alive "JOB JOB"]

Attempts of this job, or of jobs that are not among `--alive`, that have no end were lost with their node or their job,
and get one. The last line printed is `go REASON` (exit code 0; REASON is why there is an attempt), or `stop REASON`
(exit code 1; nothing began): another living job has this run directory, a person asks for a stop, or too many attempts
were lost. It imports no torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from shardforge.core.errors import ForgeError
from shardforge.core.rundir import RunDir
from shardforge.launch import decide, history
from shardforge.launch.decide import Limits, failures, forget, names, since_a_person
from shardforge.launch.ending import OUTSIDE, Traces, ending, look
from shardforge.launch.history import Attempt

FIRST = "first"


def open_(past: Sequence[Attempt], start: str) -> list[Attempt]:
    """Attempts without an end, but for `start` itself."""
    return [each for each in past if each.end is None and each.start != start]


def lost(each: Attempt, job: str, alive: Collection[str] | None) -> bool:
    """Whether an attempt without an end is over. `alive` are the jobs that run now, None when nobody asked."""
    return each.job == job or (alive is not None and each.job not in alive)


def closed(each: Attempt, traces: Traces, past: Sequence[Attempt]) -> Attempt:
    """`each` with the end that its traces tell of. Nobody decided anything then."""
    unread = replace(traces, wish=None)  # a wish that nobody followed is for the next attempt
    found = ending(each, unread, [other for other in past if other.start != each.start])
    return replace(each, end=found.line(traces.step, time.time()))


def refusal(past: Sequence[Attempt], start: str, wish: str | None, limits: Limits) -> str:
    """Why the attempt `start` may not begin; "" when it may. What is open in `past` is alive."""
    if alive := open_(past, start):
        return f"occupied: job {alive[-1].job} trains in this run directory"
    if wish is not None and history.kind(wish) not in OUTSIDE:
        return wish
    if (many := failures(since_a_person(past))) > limits.most:
        return f"{many} failures, and {limits.most} restarts were allowed"
    return ""


def reason(past: Sequence[Attempt]) -> str:
    """Why there is another attempt after these."""
    life = since_a_person(past)
    if not life:
        return "started again" if past else FIRST
    last = max((each for each in life if each.end), key=lambda each: each.end.time if each.end else 0, default=None)
    return last.end.reason if last is not None and last.end is not None else FIRST


def begin(run_dir: RunDir, attempt: Attempt, alive: Collection[str] | None, limits: Limits) -> tuple[bool, str]:
    """Whether `attempt` has begun, and the reason. An attempt that began before goes on as the same one."""
    past = history.read(run_dir.attempts)
    for each in open_(past, attempt.start):
        if lost(each, attempt.job, alive):
            over = closed(each, look(run_dir, each.start), past)
            past[past.index(each)] = over
            assert over.end is not None
            history.ended(run_dir.attempts, each.start, over.end)
    known = history.find(past, attempt.start)
    if known is not None:
        return True, known.reason
    traces = look(run_dir, attempt.start)
    # without --alive nobody knows whether the job of an open attempt lives; the ranks find out, by the lock
    sure = past if alive is not None else [each for each in past if each.end is not None]
    if why := refusal(sure, attempt.start, traces.wish, limits):
        if not why.startswith("occupied"):
            forget(run_dir, traces)
        return False, why
    why = reason(past)
    history.begun(run_dir.attempts, replace(attempt, step=traces.step, reason=why))
    return True, why


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m shardforge.launch.attempts", description=__doc__)
    one = parser.add_subparsers(dest="action", required=True).add_parser("begin", help="note that an attempt begins")
    one.add_argument("run", metavar="RUN", type=lambda text: RunDir(Path(text)))
    one.add_argument("--start", required=True, help="its name, JOB.RESTART.TRY")
    one.add_argument("--job", required=True, help="id of the job")
    one.add_argument("--restart", type=int, required=True, help="how often Slurm had started the job again")
    one.add_argument("--try", type=int, required=True, dest="tried", help="how often the script had, inside of the job")
    one.add_argument("--nodes", required=True, help="names of its nodes")
    one.add_argument("--alive", help="ids of the jobs that run now, as squeue says them")
    args = parser.parse_args(argv)
    attempt = Attempt(
        start=args.start,
        job=args.job,
        restart=args.restart,
        tried=args.tried,
        nodes=names(args.nodes),
        time=time.time(),
    )
    alive = None if args.alive is None else names(args.alive)
    try:
        goes, why = begin(args.run, attempt, alive, decide.limits_of(args.run))
    except (ForgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        goes, why = False, " ".join(str(error).split())
    print(f"{'go' if goes else 'stop'} {why}", flush=True)
    return 0 if goes else 1


if __name__ == "__main__":
    sys.exit(main())
