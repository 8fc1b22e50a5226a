"""The launcher's watch over a step: python -m shardforge.train.vigil RUN_DIR --start START

Ranks that hang are named and ended by the other ranks. What is left is a run of which nobody can speak any more: its
first rank frozen, with all others or as the only one. Its lease (lock.py) then beats no longer. This process says so in
the run directory, as a rank would have done, and ends with 1, whereupon the launcher ends the step. It imports no torch
and is ended by its launcher when the step ends by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from shardforge.core.errors import EngineError
from shardforge.core.rundir import RunDir
from shardforge.train.failure import Blamed, Failure, record
from shardforge.train.lock import Holder, beat_of, holder_of

LOOK_S = 5.0
BEGIN_S = 1800.0
"""From the start of the step to the first sign of life: images are pulled, packages imported, nodes waited for."""
LATER_S = 60.0
"""After train.timeout: the ranks speak first, where they can."""
LEAVE_S = 180.0
"""From the words of a rank to the end of all: they may finish a save."""
DEFAULT_TIMEOUT_S = 600.0


class Vigil:
    """Looks at one start of a run. `clock` gives seconds and only measures silence."""

    def __init__(self, run_dir: RunDir, start: str, clock: Callable[[], float] = time.monotonic):
        self.run_dir, self.start, self._clock = run_dir, start, clock
        self._holder: Holder | None = None
        self._beat = 0
        self._since = self._spoken = clock()

    def look(self) -> Failure | None:
        """A failure when the step has to be ended; one without text when a rank has said why."""
        now = self._clock()
        if not self._has_spoken():
            self._spoken = now
        elif now - self._spoken > LEAVE_S:
            return Failure(text="")
        holder = holder_of(self.run_dir.lock)
        if holder is not None and holder.start == self.start:
            beat = beat_of(self.run_dir.lock)
            if (holder, beat) != (self._holder, self._beat):
                self._holder, self._beat, self._since = holder, beat, now
        silent = now - self._since
        if self._holder is None:
            return self._never_began(silent) if silent > BEGIN_S else None
        return self._frozen(self._holder, silent) if silent > patience(self.run_dir) + LATER_S else None

    def _has_spoken(self) -> bool:
        try:
            return json.loads(self.run_dir.failure.read_text())["start"] == self.start
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _never_began(self, silent: float) -> Failure:
        what = f"no rank has begun to train in {silent:.0f} s"
        fix = "look at what the ranks printed: an image, an import or a file system that hangs; then start again"
        return Failure(text=f"error: {EngineError(what, self.run_dir.path, fix)}", cause="lost")

    def _frozen(self, holder: Holder, silent: float) -> Failure:
        what = f"rank 0 ({holder}) has given no sign of life for {silent:.0f} s, and no other rank has said why"
        fix = "look at that process and its node (a stopped process, a hanging driver or file system), then start again"
        return Failure(
            text=f"error: {EngineError(what, self.run_dir.path, fix)}",
            cause="frozen",
            blamed=(Blamed(0, holder.node, "frozen"),),
            node=holder.node or None,
        )


def patience(run_dir: RunDir) -> float:
    """train.timeout of the run."""
    try:
        return float(yaml.safe_load(run_dir.recipe.read_text())["train"]["timeout"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return DEFAULT_TIMEOUT_S


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def main(words: list[str] | None = None, pause: Callable[[float], None] = time.sleep) -> int:
    parser = argparse.ArgumentParser(prog="python -m shardforge.train.vigil", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--start", required=True, help="the name of the start, as in SHARDFORGE_START")
    args = parser.parse_args(words)
    run_dir = RunDir(args.run)
    vigil = Vigil(run_dir, args.start)
    while (failure := vigil.look()) is None:
        pause(LOOK_S)
    if failure.text:
        said = record(failure, args.start, rank=-1)
        _write(run_dir.failure, json.dumps(said))
        _write(run_dir.verdict, f"{failure.text}\n")
        print(failure.text, file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
