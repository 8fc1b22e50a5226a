"""Converting a random Llama with all cores, beside `cp` of what it wrote. Both end when the disk has the bytes.

Files are read from the disk, or from memory where it still has them, by both alike; the proof of a conversion is not
part of it.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from shardforge.bench import upcycle
from shardforge.bench.upcycle import SPARE, Size
from shardforge.core.errors import ForgeError
from shardforge.core.units import bytes_

USUAL_BYTES = 3e9
Convert = Callable[[Path, Path, str], object]
"""(source, target, format): makes the target."""


def usual(hidden: int, inner: int, dtype: str) -> Size:
    """With as many layers as make USUAL_BYTES of feed-forward matrices."""
    one = Size(1, hidden, inner, 1, dtype)
    return Size(max(2, round(USUAL_BYTES / one.bytes)), hidden, inner, 1, dtype)


def run(convert: Convert, size: Size, pairs: int, folder: Path | None, tell: Callable[[str], object]) -> float:
    """Speed of converting over speed of copying, the slower of both directions, each the median of `pairs`."""
    with TemporaryDirectory(prefix="bench-convert-", dir=folder) as made:
        place = Path(made)
        needed, free = int(4 * size.bytes * SPARE), shutil.disk_usage(place).free
        if needed > free:
            what = f"the files need {bytes_(needed)} and the disk has {bytes_(free)} left"
            raise ForgeError(what, place.parent, "--folder on another disk, or fewer --layers")
        there, back = place / "there", place / "back"
        there.mkdir()
        back.mkdir()
        upcycle.write_source(there / "source", size)
        slow = []
        for around, to in ((there, "shardforge"), (back, "huggingface")):
            ratios = []
            for pair in range(pairs):
                written, spent, copied = upcycle.once(partial(_to, convert, to), around)
                ratios.append(copied / spent)
                rates = f"converting {spent:.1f} s, {bytes_(written / spent)}/s; cp {copied:.1f} s, "
                rates += f"{bytes_(written / copied)}/s"
                tell(f"{size.dtype} to {to} {pair + 1}: {bytes_(written)}: {rates}; ratio {ratios[-1]:.2f}")
            slow.append(statistics.median(ratios))
            if around == there:
                convert(there / "source", back / "source", to)
    return min(slow)


def _to(convert: Convert, to: str, source: Path, target: Path) -> object:
    return convert(source, target, to)
