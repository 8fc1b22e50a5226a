"""After an attempt: whether to start again, and without which nodes.

    python -m shardforge.launch.decide RUN --start START --phase preflight|train --code CODE --nodes a,b,c
                                       [--state "JobState=RUNNING ..."] [--lost a,b]

Notes the end of the attempt START in RUN/launch/attempts.jsonl and prints one line, also left in RUN/launch/decision:

    finished                        all steps are done
    again REASON                    start again
    exclude NODE[,NODE] REASON      start again on others
    stop REASON                     leave it to a person

Asked twice for one attempt it says the same again. It imports no torch.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardforge.core.errors import ForgeError
from shardforge.core.rundir import RunDir
from shardforge.launch import cluster, history, queue
from shardforge.launch.ending import Ending, Traces, ending, look
from shardforge.launch.history import Attempt, End

FAILURES = ("crash", "lost", "preflight", "occupied")
FRUITLESS = ("crash", "walltime")
"""Kinds of ends that speak against the run itself when they leave no new checkpoint. A node that was lost, a preemption
and a preflight that found a sick node do not."""


@dataclass(frozen=True)
class Limits:
    most: int  # restarts after failures, of a run
    without_progress: int  # attempts in a row without a new checkpoint


@dataclass(frozen=True)
class Decision:
    verb: str  # finished, again, exclude or stop
    reason: str = ""
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(part for part in (self.verb, ",".join(self.nodes), self.reason) if part)


def decide(
    past: Sequence[Attempt], attempt: Attempt, traces: Traces, limits: Limits, now: float
) -> tuple[Decision, End]:
    """What to do after `attempt`, and its end line. `past` has all attempts, `attempt` among them or not.

    A function of its arguments alone: it reads no file and no clock.
    """
    others = [each for each in past if each.start != attempt.start]
    found = ending(attempt, traces, others)
    end = found.line(traces.step, now)
    here = replace(attempt, end=end)
    decision = judge([*since_a_person(others), here], found, limits)
    return decision, replace(end, decision=str(decision))


def since_a_person(past: Sequence[Attempt]) -> list[Attempt]:
    """The attempts after the last that was to be the last: who starts a run after that has looked at it."""
    last = [at for at, each in enumerate(past) if each.end and each.end.decision.split(" ")[0] in ("stop", "finished")]
    return list(past[last[-1] + 1 :] if last else past)


def judge(life: Sequence[Attempt], found: Ending, limits: Limits) -> Decision:
    """`life` are the attempts since a person last started the run; the last of them ended as `found` says."""
    here, before = life[-1], life[:-1]
    if found.outcome == "finished":
        return Decision("finished")
    if found.final:
        return Decision("stop", found.reason)
    twin = next((each for each in before if _same_step(each, found)), None)
    if twin is not None and twin.end is not None:
        return Decision("stop", f"poison: step {found.failed_step} failed twice; {found.reason}; in {twin.start} too")
    count = fruitless(life)
    if found.kind in FRUITLESS and count >= limits.without_progress:
        return Decision("stop", f"{count} attempts without a new checkpoint since step {here.step}; {found.reason}")
    if found.kind in FAILURES and (many := failures(life)) > limits.most:
        return Decision("stop", f"{many} failures, and {limits.most} restarts were allowed; {found.reason}")
    nodes = found.nodes or _suspects(before, found, here)
    return Decision("exclude", found.reason, nodes) if nodes else Decision("again", found.reason)


def _same_step(each: Attempt, found: Ending) -> bool:
    return found.failed_step is not None and each.end is not None and each.end.failed_step == found.failed_step


def fruitless(life: Sequence[Attempt]) -> int:
    """How many attempts since the last new checkpoint speak against the run."""
    count = 0
    for attempt in reversed(life):
        if attempt.advanced:
            break
        count += attempt.end is not None and attempt.end.kind in FRUITLESS
    return count


def failures(life: Sequence[Attempt]) -> int:
    """How many attempts failed or were lost, whatever they had saved before."""
    return sum(attempt.end is not None and attempt.end.kind in FAILURES for attempt in life)


def _suspects(before: Sequence[Attempt], found: Ending, here: Attempt) -> tuple[str, ...]:
    """Nodes on which ranks died or froze twice, where there are others."""
    known = {node for each in before if each.end is not None for node in each.end.blamed}
    again = tuple(node for node in found.blamed if node in known)
    return again if len(again) < len(here.nodes) else ()


def limits_of(run_dir: RunDir) -> Limits:
    """Those of the cluster profile that the run was submitted with."""
    found = cluster.load(run_dir.launch / "cluster.yaml").config.restarts
    return Limits(found.most, found.without_progress)


def names(text: str) -> tuple[str, ...]:
    """Names between commas, spaces or newlines."""
    return tuple(re.findall(r"[^\s,]+", text))


def state_of(text: str) -> dict[str, str]:
    """The Key=Value words of scontrol. A state alone is JobState."""
    return dict(queue.pairs(text)) or {"JobState": text.strip()}


def note(run_dir: RunDir, args: argparse.Namespace) -> str:
    """Note the end of the attempt; the decision comes back."""
    past = history.read(run_dir.attempts)
    known = history.find(past, args.start)
    if known is not None and known.end is not None and known.end.decision:
        return known.end.decision
    state = state_of(args.state)
    traces = look(
        run_dir,
        args.start,
        phase=args.phase,
        code=args.code,
        state=state.get("JobState", ""),
        preempted=bool(queue.known(state.get("PreemptTime", ""))),
        lost=names(args.lost),
    )
    attempt = known or history.named(args.start, names(args.nodes), traces.step, "")
    decision, end = decide(past, attempt, traces, limits_of(run_dir), time.time())
    if known is None:
        history.begun(run_dir.attempts, attempt)
    history.ended(run_dir.attempts, args.start, end)
    if end.kind != "occupied":
        forget(run_dir, traces)
    return str(decision)


def forget(run_dir: RunDir, traces: Traces) -> None:
    """Remove the STOP file that was read; one that came since then stays."""
    if traces.wish is not None and look(run_dir, "").wish == traces.wish:
        run_dir.stop.unlink(missing_ok=True)


def tell(run_dir: RunDir, line: str) -> None:
    """Print the line last of all, and leave it in a file that is whole whenever it is read."""
    try:
        history.put(run_dir.decision, line)
    except OSError as error:
        print(f"{run_dir.decision} cannot be written: {error.strerror}", file=sys.stderr)
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m shardforge.launch.decide", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=lambda text: RunDir(Path(text)))
    parser.add_argument("--start", required=True, help="the attempt, JOB.RESTART.TRY")
    parser.add_argument("--phase", choices=("preflight", "train"), default="train", help="in which it ended")
    parser.add_argument("--code", type=int, required=True, help="the exit code of that")
    parser.add_argument("--nodes", default="", help="names of its nodes")
    parser.add_argument("--state", default="", help="JobState=... and PreemptTime=..., as scontrol says them")
    parser.add_argument("--lost", default="", help="names of nodes that are down now")
    args = parser.parse_args(argv)
    try:
        line = note(args.run, args)
    except (ForgeError, OSError) as error:  # nothing is known of earlier attempts then, or this one cannot be counted
        print(f"error: {error}", file=sys.stderr)
        line = f"stop {' '.join(str(error).split())}"
    tell(args.run, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
