"""Before the ranks start: is every node of the allocation fit for the run? One process a node, the first one decides.

    srun --ntasks-per-node=1 python -m shardforge.launch.preflight --run RUN --start START --head ADDRESS --port PORT
         --nodes node1,node2,node3 --ends-at SECONDS_SINCE_1970

The first node listens on the port that training will use, asks all, and writes launch/preflight/START.*
(see preflight_report). Its exit code is that of START.code; the others end with 0 once they have answered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch import preflight_wanted
from shardforge.launch.preflight_checks import FEW, STOP, Clock, Verdict, judge
from shardforge.launch.preflight_desk import Desk, PortTaken, serve
from shardforge.launch.preflight_node import Node
from shardforge.launch.preflight_report import Report
from shardforge.launch.preflight_survey import Survey, conduct
from shardforge.launch.preflight_wanted import Wanted

FINDING_S = 180.0
"""A node looks for the desk this long; the first node may still be starting Python."""
TAIL = 1 << 20
"""Bytes at the end of metrics.jsonl that tell how long steps and saves take."""
LOST = 5
"""Exit code of a node that never found the desk."""


def folder(run_dir: RunDir) -> Path:
    return run_dir.launch / "preflight"


def lead(
    wanted: Wanted,
    run_dir: RunDir,
    start: str,
    order: Sequence[str],
    head: str,
    port: int = 0,
    ends_at: float | None = None,
) -> Report:
    """Be the first node of `order`: ask all, itself too, and judge. Writes no report.

    PortTaken when somebody else listens there.
    """
    begin, here = time.monotonic(), folder(run_dir)
    wanted = _with_room(wanted, run_dir)
    desk = Desk(start, order, port)
    node = Node(order[0], here)
    line = threading.Thread(target=serve, args=(head, desk.port, start, order[0], node.answer, FINDING_S), daemon=True)
    line.start()
    try:
        token = _leave(here / f"{start}.token")
        desk.admit(wanted.config.patience_s)
        survey = conduct(desk, wanted, token, {order[0]: head})
    finally:
        desk.close()
        line.join(1.0)
        node.close()
        _remove(here / f"{start}.token")
    step_s, save_s = pace(run_dir)
    left = None if ends_at is None else ends_at - time.time()
    clock = Clock(left, step_s, save_s)
    verdict = judge(wanted, order, survey.facts, survey.findings, clock, survey.warnings, survey.broken)
    return Report(start, order, wanted, survey, verdict, time.monotonic() - begin)


def alone(wanted: Wanted, run_dir: RunDir) -> Report:
    """This machine as the only node; nothing of the run directory is left that was not there."""
    here = folder(run_dir)
    made = [each for each in (here, *here.parents) if not each.exists()]
    try:
        return lead(wanted, run_dir, "here", [platform.node()], "127.0.0.1")
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


def _leave(token: Path) -> str:
    """Nodes that share the run directory see this file. Its name; "" where it cannot be written, which each node then
    says of itself."""
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("the nodes of this start look for this file\n")
    except OSError:
        return ""
    return token.name


def _remove(token: Path) -> None:
    with suppress(OSError):
        token.unlink(missing_ok=True)


def _with_room(wanted: Wanted, run_dir: RunDir) -> Wanted:
    """One more checkpoint must fit beside those that are there."""
    from shardforge.checkpoint import folders

    steps = folders.committed(run_dir.checkpoints)
    if not steps:
        return wanted
    newest = run_dir.checkpoints / folders.name(steps[-1])
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    room = max(wanted.config.free_disk, size)
    return dataclasses.replace(wanted, config=dataclasses.replace(wanted.config, free_disk=room))


def pace(run_dir: RunDir) -> tuple[float | None, float | None]:
    """(seconds of a step, of the longest save) that the end of the metrics tells; None where it says nothing."""
    try:
        with run_dir.metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")[1 if size > TAIL else 0 : -1]
    except OSError:
        return None, None
    steps: list[float] = []
    saves: list[float] = []
    ended: dict[int, float] = {}
    for line in lines:
        try:
            event = json.loads(line)
            if event["event"] == "step":
                steps.append(event["seconds"] - event.get("save_seconds", 0.0))
                ended[event["step"]] = event["time"]
            elif event["event"] == "checkpoint" and event["step"] in ended:
                saves.append(event["time"] - ended[event["step"]])
        except (ValueError, KeyError, TypeError):
            continue
    return (statistics.median(steps) if steps else None), max(saves, default=None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m shardforge.launch.preflight", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run directory")
    parser.add_argument("--start", required=True, help="name of this start: job, restart and try")
    parser.add_argument("--head", required=True, help="address of the first node")
    parser.add_argument("--port", type=int, required=True, help="port that training will use on it")
    parser.add_argument("--nodes", required=True, help="all nodes of the allocation, in order")
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME") or platform.node(), help="this node")
    parser.add_argument("--ends-at", type=float, help="end of the job in seconds since 1970")
    args = parser.parse_args(argv)
    order, run_dir = re.split(r"[,\s]+", args.nodes.strip(" ,")), RunDir(args.run.absolute())
    if args.node not in order:
        print(f"error: this node is {args.node}, which is none of {', '.join(order)}", file=sys.stderr)
        return LOST
    if args.node == order[0]:
        return first(run_dir, args.start, order, args.head, args.port, args.ends_at)
    node = Node(args.node, folder(run_dir))
    try:
        found = serve(args.head, args.port, args.start, args.node, node.answer, FINDING_S)
    finally:
        node.close()
    if not found:
        print(f"error: {args.node} did not find the first node at {args.head} port {args.port}", file=sys.stderr)
    return 0 if found else LOST


def first(run_dir: RunDir, start: str, order: Sequence[str], head: str, port: int, ends_at: float | None = None) -> int:
    """The whole preflight as the first node; its exit code, with the report printed and written."""
    wanted = Wanted(nodes=len(order))
    try:
        wanted = preflight_wanted.read(run_dir)
        report = lead(wanted, run_dir, start, order, head, port, ends_at)
    except PortTaken as error:
        report = Report(start, order, wanted, Survey(), Verdict(FEW, (), {}, short=str(error)), 0.0)
    except LaunchError as error:
        report = Report(start, order, wanted, Survey(), Verdict(STOP, (), {}, (str(error),)), 0.0)
    for line in report.lines():
        print(line, flush=True)
    try:
        report.write(folder(run_dir))
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return max(report.verdict.code, FEW)
    return report.verdict.code


if __name__ == "__main__":
    sys.exit(main())
