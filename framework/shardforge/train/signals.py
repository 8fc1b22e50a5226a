"""Stop requests: signals and the STOP file become one flag, agreed by all ranks at the same step.

SIGTERM, SIGUSR1 (what Slurm is told to send ahead of a limit) and SIGINT ask for "save and stop". A second SIGINT is
an interrupt at once. A launcher that cannot pass signals on touches the STOP file instead.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequests:
    """Inside `with`, the signals above set a flag. `agreed()` is a collective of every rank, once a step."""

    def __init__(self, stop_file: Path, group: dist.ProcessGroup | None):
        self.stop_file, self.group = stop_file, group
        self.reason = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        for number in ASKING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. The STOP file is looked at by the first rank only."""
        if not self.reason and (self.group is None or self.group.rank() == 0) and self.stop_file.exists():
            self.reason = "STOP file"
        if self.group is None:
            return bool(self.reason)
        flag = torch.tensor([bool(self.reason)], dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())
