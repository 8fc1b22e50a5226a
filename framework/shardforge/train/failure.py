"""How a start failed, as failure.json keeps it for the launcher: an exit code, a cause, a step, and who is to blame."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MISTAKE, CRASH, INTERRUPTED = 2, 1, 130

Cause = Literal["mistake", "interrupted", "error", "dead", "frozen", "hang", "order", "lost"]
"""mistake       no start repairs it: a recipe, a damaged file, a full disk, a loss that is not finite
interrupted   the user
error         an exception in a rank
dead          a rank's process is gone
frozen        no sign of life from a rank
hang          a rank lives and does not move, and others wait for it
order         ranks wait for each other in different collectives
lost          contact to a rank was lost, and nothing is known of it"""

HARDWARE = ("uncorrectable ECC", "uncorrectable NVLink", "fallen off the bus", "hardware error", "Xid (")
HARDWARE += ("CUDA-capable device(s) is/are busy", "no CUDA-capable device", "system not yet initialized")
"""What an error says that speaks against its node."""


@dataclass(frozen=True)
class Blamed:
    """A rank for which the others waited, or that failed."""

    rank: int
    node: str
    state: str  # "dead", "frozen", "elsewhere", "astray" (in another collective) or "failed"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What one rank says for all. Without text another rank has said it."""

    text: str
    code: int = CRASH
    cause: Cause = "lost"
    step: int | None = None  # the one that was computed, the first is 1; None outside of the loop
    blamed: tuple[Blamed, ...] = ()
    node: str | None = None  # speaks against this node: start again without it
    page: str = field(default="", compare=False)  # of verdict.txt, below the text

    def told(self) -> str:
        return json.dumps(asdict(self))


def record(failure: Failure, start: str, rank: int) -> dict[str, Any]:
    """What failure.json has; `rank` speaks, -1 is the launcher."""
    said = {name: value for name, value in asdict(failure).items() if name not in ("text", "page")}
    who = {"start": start, "time": time.time(), "rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
    return who | {"message": failure.text} | said


def recall(told: str | bytes) -> Failure:
    found: dict[str, Any] = json.loads(told)
    blamed = tuple(Blamed(**each) for each in found.pop("blamed"))
    return Failure(**found, blamed=blamed)


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """The node as the scheduler calls it, else as it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def broken_hardware(text: str) -> bool:
    return any(sign in text for sign in HARDWARE)
