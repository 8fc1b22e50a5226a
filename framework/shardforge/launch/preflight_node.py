"""One node of a preflight: answers what the desk asks, and keeps the processes that measure bandwidth."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardforge.launch import preflight_facts as facts
from shardforge.launch.preflight_wanted import Wanted, from_plain

LANE = "shardforge.launch.preflight_lane"
KILLED_S = 5.0
"""A process that was killed is gone by then."""


class Lanes:
    """`count` processes of `command`, one a GPU. One that hangs or ends is replaced when it is asked again."""

    def __init__(self, count: int, cuda: bool, command: Sequence[str] = (sys.executable, "-m", LANE)):
        self._command, self._cuda = command, cuda
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count

    def start(self) -> None:
        """Begin what takes long, the import of torch; returns at once."""
        for number, process in enumerate(self._processes):
            if process is None or process.poll() is not None:
                self._close(number)
                words = [*self._command, str(number), "cuda" if self._cuda else "cpu"]
                quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
                self._processes[number] = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **quiet}, bufsize=0
                )

    def ask(self, questions: Sequence[Mapping[str, Any]], patience_s: float) -> list[dict[str, Any]]:
        """The answer of each lane to its question; {"error": why} of one that gave none."""
        self.start()
        told: list[dict[str, Any] | None] = [None] * len(questions)
        came = [b""] * len(questions)
        with selectors.DefaultSelector() as selector:
            for number, question in enumerate(questions):
                process = self._processes[number]
                assert process is not None and process.stdin is not None and process.stdout is not None, number
                try:
                    process.stdin.write(json.dumps(question).encode() + b"\n")
                except BrokenPipeError:
                    told[number] = {"error": self._ended(number)}
                    continue
                selector.register(process.stdout, selectors.EVENT_READ, number)
            until = time.monotonic() + patience_s
            while None in told and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    piece = os.read(key.fd, 1 << 16)
                    came[key.data] += piece
                    if not piece:
                        told[key.data] = {"error": self._ended(key.data)}
                    elif came[key.data].endswith(b"\n"):
                        told[key.data] = json.loads(came[key.data])
                    if told[key.data] is not None:
                        selector.unregister(key.fileobj)
        for number, each in enumerate(told):
            if each is None:
                self._close(number)
        return [each or {"error": f"no answer in {patience_s:.3g} s"} for each in told]

    def close(self) -> None:
        for number in range(len(self._processes)):
            self._close(number)

    def _ended(self, number: int) -> str:
        process = self._processes[number]
        assert process is not None, number
        return f"the process ended with code {process.wait(KILLED_S)}"

    def _close(self, number: int) -> None:
        process, self._processes[number] = self._processes[number], None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps its process, killed or not
                process.wait(KILLED_S)


class Node:
    """`node` is its name in the allocation, `run` the run directory as this node sees it."""

    def __init__(self, node: str, folder: Path, lanes: Lanes | None = None):
        self.node, self.folder, self.lanes = node, folder, lanes
        self.wanted: Wanted | None = None

    def answer(self, ask: str, message: Mapping[str, Any]) -> Any:
        return {"clock": self.clock, "begin": self.begin, "facts": self.facts, "lanes": self.ask_lanes}[ask](message)

    def clock(self, message: Mapping[str, Any]) -> float:
        return time.time()

    def begin(self, message: Mapping[str, Any]) -> None:
        self.wanted = from_plain(message["wanted"])
        count = lanes(self.wanted)
        if self.lanes is None and count:
            self.lanes = Lanes(count, self.wanted.checks_gpus)
        if self.lanes is not None:
            self.lanes.start()

    def facts(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self.wanted is not None, "the desk begins with begin"
        return facts.plain(facts.gather(self.wanted, self.folder, self.node, message["token"]))

    def ask_lanes(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        assert self.lanes is not None, "the desk asks only where lanes are"
        return self.lanes.ask(message["own"], message["limit_s"])

    def close(self) -> None:
        if self.lanes is not None:
            self.lanes.close()


def lanes(wanted: Wanted) -> int:
    """Processes of a node that measure: one a GPU, one where there are none, none where nothing is to be measured."""
    if wanted.checks_gpus:
        return wanted.gpus
    return 1 if wanted.config.measured and wanted.nodes > 1 else 0
