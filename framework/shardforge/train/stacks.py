"""The stacks of this rank as text, for the page of a verdict: what its threads do, and what its GPU waits for.

Equal stacks give equal text, so that of thousands of ranks only what differs is kept.
"""

from __future__ import annotations

import json
import threading

from shardforge.train.place import OURS, Stack, line_of, recorder, stack_of

MAIN = f"{OURS}train/main.py"
"""What called it is the same in every run."""
DEEP = 60
"""Frames of a thread, the innermost; a stack that is deeper is a recursion."""
RECENT = 8
"""Unfinished collectives of the flight recorder."""


def told(main: Stack) -> str:
    """Of the main thread, of every other thread that is in a line of ours, and of the collectives in flight."""
    parts = [_thread("main thread", main)]
    for each in sorted(threading.enumerate(), key=lambda thread: thread.name):
        if each is threading.main_thread() or each.name.startswith("shardforge-") or each.ident is None:
            continue
        stack = stack_of(each.ident)
        if any(frame.f_code.co_filename.startswith(OURS) for frame, _ in stack):
            parts.append(_thread(f"thread {each.name}", stack))
    waiting = in_flight()
    if waiting:
        parts.append("\n".join(["torch's flight recorder, unfinished:", *(f"  {each}" for each in waiting)]))
    return "\n".join(parts)


def _thread(name: str, stack: Stack) -> str:
    begun = next((at for at, (frame, _) in enumerate(stack) if frame.f_code.co_filename == MAIN), len(stack))
    lines = [f"  {line_of(frame, number)}" for frame, number in reversed(stack[: begun + 1][:DEEP])]
    return "\n".join([f"{name}, most recent call last:", *lines])


def in_flight() -> list[str]:
    """Collectives that torch's flight recorder has seen begin and not end, the oldest first; of NCCL."""
    dump = recorder()
    if dump is None:
        return []
    found = [entry for entry in json.loads(dump(True, True)).get("entries", ()) if not entry.get("retired")]
    return [_entry(entry) for entry in found[:RECENT]]


def _entry(entry: dict) -> str:
    group = ", ".join(str(name) for name in entry.get("process_group", ()))
    return (
        f"{entry.get('profiling_name', 'unknown')} of group {group}, call {entry.get('collective_seq_id')}, "
        f"{entry.get('input_sizes')} to {entry.get('output_sizes')}, {entry.get('state')}"
    )
