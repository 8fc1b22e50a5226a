"""What an optimizer kept, as the target's reader gives it, beside the source's: two tensors in memory at a time."""

from __future__ import annotations

from collections.abc import Collection

from shardforge.convert.design import updated
from shardforge.convert.lockstep import difference
from shardforge.families.source import Source


def compared(source: Source, target: Source, kinds: Collection[str]) -> tuple[int, list[str]]:
    """How many tensors were compared, and a line for each that is not the source's in the type of the target. `kinds`
    were carried; numbers that the target counts and the source too are compared with them."""
    if not kinds:
        return 0, []
    known = (*target.moments, *target.counts)
    wrong = [f"{kind} of the optimizer was carried and is not here" for kind in sorted(kinds) if kind not in known]
    count = 0
    for kind in (kind for kind in (*source.moments, *source.counts) if kind in known):
        for name in updated(source):
            mine, theirs = source.read_moment(kind, name), target.read_moment(kind, name)
            count += 1
            if told := difference(f"{kind} of {name}", mine, theirs, mine.dtype):
                wrong.append(told)
    return count, wrong
