"""Stop requests: signals and the STOP file become one flag, agreed by all ranks at the same step.

SIGTERM, SIGUSR1 (what Slurm is told to send ahead of a limit) and SIGINT ask for "save and stop". A second SIGINT is
an interrupt at once. A launcher that cannot pass signals on writes the STOP file instead, whose first line is the
reason.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FILE = "STOP file"
"""The reason in a STOP file without text."""
REASONS = ("", FILE, *(number.name for number in ASKING))
"""What the ranks agree on is a number in here."""


class StopRequests:
    """Inside `with`, the signals above set a flag. `agreed()` is a collective of every rank, once a step."""

    def __init__(self, stop_file: Path, group: dist.ProcessGroup | None):
        self.stop_file, self.group = stop_file, group
        self.reason = ""
        self._asked = False  # this rank itself, by a signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        for number in ASKING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self.reason = self.reason or signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; `reason` says why on each. The STOP file is read by the first rank."""
        leads = self.group is None or self.group.rank() == 0
        if not self.reason and leads and self.stop_file.exists():
            self.reason = first_line(self.stop_file) or FILE
        if self.group is None:
            return bool(self.reason)
        own = REASONS.index(self.reason) if self.reason in REASONS else REASONS.index(FILE)
        flag = torch.tensor([own], dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        self.reason = self.reason or REASONS[int(flag.item())]
        return bool(self.reason)

    def why(self) -> str:
        """The reason in full: a STOP file is there before the text in it."""
        return (first_line(self.stop_file) if self.reason == FILE else "") or self.reason


def first_line(path: Path) -> str:
    """What a STOP file says; "" where it says nothing, or is not there any more."""
    try:
        return path.read_text(errors="replace").strip().partition("\n")[0]
    except OSError:
        return ""
