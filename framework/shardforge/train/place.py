"""Where a thread is: the collective that it waits in and the part of the step, read from its frames.

Nothing is instrumented. `signature` is cheap and holds on to nothing; `place` looks into the variables of the frames,
so it is for a thread that stands still. Backward of a GPU runs in threads of torch's own, whose frames come first.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardforge

Stack = list[tuple[FrameType, int]]
"""Frames and their lines, innermost first."""

OURS = f"{Path(shardforge.__file__).parent}/"
TORCH = f"{Path(torch.__file__).parent}/"
DISTRIBUTED = f"{TORCH}distributed/"
COLLECTIVES = tuple(DISTRIBUTED + name for name in ("distributed_c10d.py", "_functional_collectives.py", "fsdp/"))
NEAR = 8
"""Frames in which a group is looked for."""
LOOP = f"{OURS}train/loop.py"
PIPELINE = f"{OURS}parallel/pipeline.py"
BEFORE = {"batch", "forward_backward", "update", "check"}
"""What the loop calls before it counts the step."""
PARTS = {
    "batch": "reading data",
    "forward_backward": "forward",
    "update": "the update",
    "agreed": "the agreement on a stop",
    "save": "a save",
    "evaluate": "the evaluation",
    "close": "the end",
    "open_run": "the start",
}
WAITS = {"wait_for_unshard": "all_gather", "foreach_reduce": "reduce_scatter", "_wait_batch_p2p": "send or receive"}
WAITS |= {"foreach_all_gather": "all_gather", "foreach_all_gather_copy_out": "all_gather"}
WAITS |= {"finalize_backward": "reduce_scatter", "_wait_for_post_backward": "reduce_scatter"}


@dataclass(frozen=True)
class Place:
    operation: str = ""  # of the collective, "all_reduce"; empty outside of one
    group: str = ""  # its name, "mesh_tp" for an axis of a mesh
    runs: tuple[tuple[int, int, int], ...] = ()  # its ranks in the world, as ranges
    call: int = 0  # collectives that this rank has begun on it
    unit: str = ""  # "block 3"
    part: str = ""  # of the step: "backward"
    step: int | None = None  # the first is 1
    line: str = ""  # of ours: "optim/clip.py:44 in global_norm"
    leaf: str = ""  # the innermost line, when it is not ours

    def waits_with(self, other: Place) -> bool:
        """Whether both are in the same operation of the same group. Counts do not tell: ranks send unequally often."""
        return self.operation == other.operation and self.runs == other.runs

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(rank for run in self.runs for rank in range(*run))


def stack_of(thread: int) -> Stack:
    """Of a running thread, by its ident; empty when it has ended."""
    frames = sys._current_frames()
    found = _outward(frames.get(thread))
    if found and found[0][0].f_code.co_name == "_engine_run_backward":
        known = {each.ident for each in threading.enumerate() if not isinstance(each, threading._DummyThread)}
        for other in (_outward(frame) for ident, frame in frames.items() if ident not in known):
            found = other + found
    return found


def stack_in(error: BaseException) -> Stack:
    """Of the thread that raised `error`, at the moment when it did."""
    step: TracebackType | None = error.__traceback__
    found: Stack = []
    while step is not None:
        found.insert(0, (step.tb_frame, step.tb_lineno))
        step = step.tb_next
    return found


def _outward(frame: FrameType | None) -> Stack:
    return [(each, each.f_lineno) for each in _frames(frame)]


def signature(stack: Stack) -> int:
    """Another one when the thread, or a collective that anyone has begun, has moved."""
    calls = tuple(_calls(group) for group in list(dist.distributed_c10d._world.pg_map))
    return hash((tuple((id(frame.f_code), frame.f_lasti) for frame, _ in stack), calls))


def glance(stack: Stack) -> Place:
    """The lines of a thread that may be moving; no variable is looked at."""
    ours = next((each for each in stack if each[0].f_code.co_filename.startswith(OURS)), None)
    return Place(
        line=line_of(*ours) if ours else "",
        leaf=line_of(*stack[0]) if stack and ours is not stack[0] else "",
    )


def place(stack: Stack) -> Place:
    """Looks at every frame, so only of a thread that stands still."""
    operation, group, call = _collective(stack)
    return replace(
        glance(stack),
        operation=operation,
        group=group.group_desc if group is not None else "",
        runs=ranges(dist.get_process_group_ranks(group)) if group is not None else (),
        call=call,
        unit=_unit(stack),
        part=_part(stack),
        step=step_of(stack),
    )


def ranges(ranks: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """The same numbers in the same order as (start, stop, step): a group of thousands is told every second."""
    found: list[tuple[int, int, int]] = []
    begin = 0
    while begin < len(ranks):
        step = ranks[begin + 1] - ranks[begin] if begin + 1 < len(ranks) else 1
        end = begin + 1
        while end < len(ranks) and ranks[end] - ranks[end - 1] == step:
            end += 1
        found.append((ranks[begin], ranks[end - 1] + (1 if step > 0 else -1), step))
        begin = end
    return tuple(found)


def _collective(stack: Stack) -> tuple[str, dist.ProcessGroup | None, int]:
    """Name and group of the collective that a thread waits in, and how many of them it has begun."""
    index = _call(frame for frame, _ in stack)
    if index is None:
        on_its_own = bool(stack) and _pending(stack[0][0].f_locals)  # our own code waits for what it began before
        if not on_its_own and not torch.cuda.is_available():
            return "", None, 0
        found = _in_flight()
        return found if found[0] or not on_its_own else ("send or receive", _group(stack), 0)
    name = stack[index][0].f_code.co_name
    group = _group(stack[index:]) or (dist.group.WORLD if dist.is_initialized() else None)
    operation = WAITS.get(name, re.sub(r"(_single|_into_tensor|_tensor|_coalesced)$", "", name))
    return operation, group, _calls(group) if group is not None else 0


def _call(frames: Iterable[FrameType]) -> int | None:
    """The innermost frame of a collective; what a collective calls back into our own code is no waiting."""
    for index, frame in enumerate(frames):
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            return None
        public = code.co_filename.startswith(COLLECTIVES) and not code.co_name.startswith("_")
        waits = code.co_filename.startswith(DISTRIBUTED) and code.co_name in WAITS
        if waits or (public and code.co_name != "wrapper"):
            return index
    return None


def in_collective(thread: int) -> bool:
    """Whether a thread, which may be moving, is in a collective now; by its ident."""
    return _call(_frames(sys._current_frames().get(thread))) is not None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _pending(within: Mapping[str, Any]) -> bool:
    """Whether the variables of a frame hold work that is not done."""
    values = [each for value in within.values() for each in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(each, dist.Work) and not each.is_completed() for each in values)


def _group(stack: Stack) -> dist.ProcessGroup | None:
    """The nearest one that a frame near the innermost knows of."""
    for frame, _ in stack[:NEAR]:
        within = frame.f_locals
        owner: Any = within.get("self")
        stages = getattr(owner, "_stages", None) or [getattr(owner, "_stage", None)]
        found = [within.get("group"), within.get("pg"), *within.get("operations", ())]
        found += [getattr(owner, "_all_gather_process_group", None), getattr(owner, "group", None), *stages]
        for each in found:
            group = each if isinstance(each, dist.ProcessGroup) else getattr(each, "group", None)
            if isinstance(group, dist.ProcessGroup):
                return group
    return None


def _in_flight() -> tuple[str, dist.ProcessGroup | None, int]:
    """The oldest unfinished collective in torch's flight recorder: a GPU waits for it while the thread does not."""
    dump = recorder()
    if dump is None:
        return "", None, 0
    named = {group.group_name: group for group in list(dist.distributed_c10d._world.pg_map)}
    for entry in json.loads(dump(True, True)).get("entries", ()):
        group = named.get(entry["process_group"][0])
        if not entry["retired"] and group is not None:
            operation = entry["profiling_name"].partition(":")[2].strip("_")
            return operation, group, entry["collective_seq_id"]
    return "", None, 0


def recorder() -> Callable[[bool, bool], bytes] | None:
    """torch's flight recorder as JSON: called with whether collectives are wanted, and only those in flight."""
    of = torch._C._distributed_c10d
    return getattr(of, "_dump_nccl_trace_json", None) or getattr(of, "_dump_fr_trace_json", None)


def _calls(group: dist.ProcessGroup) -> int:
    try:
        return group._get_sequence_number_for_group()
    except RuntimeError:  # a backend that does not count
        return 0


def _unit(stack: Stack) -> str:
    for frame, _ in stack:
        if not frame.f_code.co_filename.startswith((OURS, TORCH)):
            continue
        owner: Any = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and getattr(owner, "slot", "") == "block":
            return f"block {getattr(owner, 'layer', '')}"
        name = None if isinstance(owner, nn.Module) else getattr(owner, "_module_fqn", None)
        if name is not None:
            block = re.search(r"blocks\.(\d+)", name)
            return f"block {block[1]}" if block else name
    return ""


def _part(stack: Stack) -> str:
    for frame, _ in stack:
        code = frame.f_code
        if code.co_name == "_engine_run_backward":
            return "backward"
        if code.co_filename == PIPELINE:  # forward of one micro-batch and backward of another
            return "the pipeline"
        if code.co_filename.startswith(OURS) and code.co_name in PARTS:
            return PARTS[code.co_name]
    return ""


def step_of(stack: Stack) -> int | None:
    """The number under which the step that the loop is in will be reported."""
    for index, (frame, _) in enumerate(stack):
        if frame.f_code.co_filename == LOOP and frame.f_code.co_name == "train":
            inside = stack[index - 1][0].f_code.co_name if index else ""
            step = frame.f_locals.get("step")
            return step if step is None else step + (inside in BEFORE)
    return None


def line_of(frame: FrameType, number: int) -> str:
    code = frame.f_code
    file = code.co_filename
    for root in (OURS, f"{Path(TORCH).parent}/"):
        file = file.removeprefix(root)
    short = file if not file.startswith("/") else "/".join(Path(file).parts[-2:])
    return f"{short}:{number} in {code.co_name}"
