"""The pulse of a rank: a small thread that says where the main thread is, and ends the run when nothing moves any more.

    every interval      the main thread's place -> the job's store; has another rank ended the run?
    no movement for     all pulses, twice -> verdict.py -> one rank speaks -> every rank leaves
    train.timeout

The main thread of a rank that waits in vain stands in C and cannot be woken, so this thread ends the process. The store
itself may hang or be gone: it is asked by a thread of its own (board.py), and nobody waits for it for long.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TypeVar

import psutil
import torch.distributed as dist

from shardforge.checkpoint.crew import PATIENCE
from shardforge.core import log
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.train import guard, page, saving, stacks
from shardforge.train.board import Board, Unreachable
from shardforge.train.failure import CRASH, Failure, node_name, recall
from shardforge.train.pace import TICK_S, Pace, Review
from shardforge.train.place import Place, Stack, glance, place, signature, stack_in, stack_of
from shardforge.train.verdict import LOST_CONTACT, Paced, Pulse, Scene, Standing, end_frozen, spot, standing

T = TypeVar("T")
FEWEST, LONGEST_S = 10, 1.0
"""Pulses in a timeout, at least; seconds between two, at most."""
SETTLED = 3
"""A living rank shows a new pulse, and where it is, after this many intervals."""
GRACE_S = 20.0
"""The rank whose turn it is speaks within this time, or another does."""
CHECKPOINT = "checkpoint/"
BUSY = 0.05
"""Share of a core. A thread outside of collectives that computes more than this is moving, wherever it is."""


class Heart:
    """Beats from `start` to `stop`. One that was never started does nothing, and knows nothing of other ranks."""

    def __init__(self, run_dir: RunDir, layout: Layout, timeout_s: float):
        self.run_dir, self.layout, self.timeout = run_dir, layout, timeout_s
        self.interval = min(LONGEST_S, timeout_s / FEWEST)
        self.rank, self.size = log.rank(), layout.world_size
        own = psutil.Process()
        process = (socket.gethostname(), own.pid, own.create_time())
        self.pulse = Pulse(self.rank, *process, 0, 0.0, Place(), node=node_name())
        self.board: Board | None = None
        self._thread: threading.Thread | None = None
        self.pace, self.review = Pace(), Review(layout)
        self._ended, self._concluding = threading.Event(), threading.Lock()
        self._main, self._launcher = threading.main_thread().ident or 0, 0
        self._seen, self._spent, self._at = 0, 0.0, time.monotonic()
        self._fixed: Place | None = None  # where the main thread failed
        self._failed: Stack = []  # there
        self._shown = b""  # the request for stacks that was answered last
        self._not_before = timeout_s

    def start(self, store: dist.Store) -> None:
        """Once the process group stands. `store` is the one that all ranks share."""
        self.board = Board(store, guard.start_id())
        self._publish()  # a rank that dies before its first beat has been here
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._launcher = os.getppid()
        self._thread = threading.Thread(target=self._beat, name="shardforge-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The work is done: the others need not wait for this rank's pulse."""
        if self._thread is None or self.board is None:
            return
        self._ended.set()
        self._thread.join(SETTLED * self.interval)
        self.pulse = replace(self.pulse, left=True)
        self._publish()
        self.board.close()

    def tell(self, failure: Failure) -> None:
        """This rank has said why it ends: the others leave too, instead of waiting for it."""
        if self.board is None:
            return
        self._concluding.acquire(blocking=False)
        said = json.dumps({"rank": self.rank, "failure": failure.told()})
        self._ask(lambda store: store.set("said", said))
        if self.rank == 0 and not _agent_hosts():
            time.sleep(SETTLED * self.interval)  # the store ends with this process, and the others have yet to read it

    def lost(self, error: BaseException) -> Failure | None:
        """What is to be said of a collective that failed with `error`; no text when another rank, or this one's pulse,
        says it; None when nothing is known."""
        if self.board is None or self._thread is None:
            return None
        if not self._concluding.acquire(blocking=False):
            self._thread.join()  # it ends the process
        self._failed = stack_in(error)
        self._fixed = place(self._failed)
        until = time.monotonic() + GRACE_S
        while not self._takes_turn() and time.monotonic() < until:
            if self._said() is not None:
                return Failure(text="")
            time.sleep(self.interval)
        return self._speech(self._scene(LOST_CONTACT))

    def _beat(self) -> None:
        while not self._rest():
            self._follow_launcher()
            self._feel()
            self._publish()
            self._show()
            self._listen()
            self._review()
            if self.pulse.idle >= self._not_before:
                self._conclude()

    def _rest(self) -> bool:
        """Wait an interval, with looks at how the main thread spends it; whether this is the end."""
        until = time.monotonic() + self.interval
        while (left := until - time.monotonic()) > 0:
            if self._ended.wait(min(left, TICK_S)):
                return True
            self.pace.look(self._main)
        return False

    def _review(self) -> None:
        """First rank: who is slower than the others."""
        if self.rank or not self.review.due():
            return
        try:
            self.pace.slow = self.review.of({rank: (each.node, each.pace) for rank, each in self._read().items()})
        except Unreachable:
            return

    def _follow_launcher(self) -> None:
        """A launcher that was killed cannot end its ranks; they save and stop as if they had been asked to."""
        if self._launcher and os.getppid() != self._launcher:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                log.logger("train").warning("the launcher (process %d) is gone; saving and stopping", self._launcher)
            self._launcher = 0
            os.kill(os.getpid(), signal.SIGTERM)

    def _feel(self) -> None:
        """Whether the main thread has moved since the last time. Time in which this process was stopped is not idle."""
        stack, now = stack_of(self._main), time.monotonic()
        seen, spent = signature(stack), time.clock_gettime(time.pthread_getcpuclockid(self._main))
        idle, still = self.pulse.idle + min(now - self._at, 2 * self.interval), 2 * self.interval
        looked = self.pulse.idle >= still  # and the place is known in full
        busy = looked and not self.pulse.place.operation and spent - self._spent > BUSY * (now - self._at)
        if self._fixed is not None:
            self.pulse = replace(self.pulse, idle=idle, place=self._fixed)
        elif seen != self._seen or busy:
            self.pulse, self._not_before = replace(self.pulse, idle=0.0, place=glance(stack)), self.timeout
        else:
            known = looked or idle < still
            self.pulse = replace(self.pulse, idle=idle, place=self.pulse.place if known else place(stack))
        self._seen, self._spent, self._at = seen, spent, now

    def _publish(self) -> None:
        self.pulse = replace(self.pulse, count=self.pulse.count + 1, pace=self.pace.sums)
        told = json.dumps(asdict(self.pulse))
        self._ask(lambda store: store.set(f"pulse/{self.rank}", told))

    def _show(self) -> None:
        """The stacks of this rank, when another asks for those of all; equal ones are told once."""
        asked = self._ask(lambda store: store.get("look") if store.check(["look"]) else b"")
        if asked and asked != self._shown:
            text = self._stacks()
            name = hashlib.sha256(text.encode()).hexdigest()[:16]

            def show(store: dist.Store) -> None:
                if not store.check([f"stack/{name}"]):
                    store.set(f"stack/{name}", text)
                store.set(f"shown/{self.rank}", name)

            self._ask(show)
            self._shown = asked

    def _stacks(self) -> str:
        return stacks.told(self._failed or stack_of(self._main))

    def _ask(self, work: Callable[[dist.Store], T]) -> T | None:
        try:
            return self.board.ask(work, max(1.0, self.interval)) if self.board else None
        except Unreachable:
            return None

    def _said(self) -> dict | None:
        """What a rank said that has ended the run."""
        told = self._ask(lambda store: store.get("said") if store.check(["said"]) else None)
        return json.loads(told) if told else None

    def _listen(self) -> None:
        said = self._said()
        if said is None or said["rank"] == self.rank:
            return
        self._ended.wait(max(1.0, 2 * self.interval))  # the main thread may have met the same, and leaves by itself
        failure = recall(said["failure"])
        if self.rank == 0:
            guard.speak(self.run_dir, failure)  # where ranks share no folder, the others' words are lost
        saving.finish(failure)
        leave(failure.code)

    def _conclude(self) -> None:
        """The main thread has stood still for too long: end the process, unless others are only slow."""
        overdue = self.pulse.idle > self._not_before + GRACE_S
        if not self._takes_turn() and not overdue:
            return  # another rank is about to speak, and this one listens
        seen = self._seen
        scene = self._scene(f"waited {self.pulse.idle:.0f} s in")
        moved = self._seen != seen
        if moved or self._is_patient(scene):
            self._not_before = self.timeout if moved else self.pulse.idle + self.timeout / 4
            self._ask(lambda store: store.compare_set("turn", str(self.rank), ""))
        elif self._concluding.acquire(blocking=False):
            failure = self._speech(scene)
            if failure.text:
                guard.speak(self.run_dir, failure)
                self.tell(failure)
            saving.finish(failure)
            leave(CRASH)

    def _takes_turn(self) -> bool:
        """Whether this rank is the one to look at all pulses and to speak. Without a store each of them is."""
        mine = str(self.rank)
        holder = self._ask(lambda store: store.compare_set("turn", "", mine))
        return holder is None or holder.decode() == mine

    def _is_patient(self, scene: Scene) -> bool:
        """While all live and a checkpoint is read or written, a rank may wait for disks, its own or another's."""

        def works(pulse: Pulse) -> bool:
            return pulse.idle < self.timeout or (CHECKPOINT in pulse.place.line and not pulse.place.operation)

        known = [each.pulse for each in scene.ranks.values() if each.state == "alive" and each.pulse is not None]
        here = self.pulse
        saves = CHECKPOINT in here.place.line and here.idle < PATIENCE.total_seconds()
        return saves and len(known) == len(scene.ranks) and any(works(pulse) for pulse in known)

    def _scene(self, begun: str) -> Scene:
        """All ranks, as they show themselves in two readings."""
        try:
            before = self._read()
            asked = f"{self.rank}.{self.pulse.count}"
            self._ask(lambda store: store.set("look", asked))
            self._pause(max(SETTLED * self.interval, 1.5))
            now = self._read()
        except Unreachable as why:
            here = self._own()
            return Scene(self.layout, self.rank, begun, {self.rank: here}, f"{self._host()} {why}")
        about = (self.pulse.host, begun == LOST_CONTACT)
        ranks = {rank: standing(rank, before.get(rank), now.get(rank), *about) for rank in range(self.size)}
        ranks[self.rank] = self._own()
        return Scene(self.layout, self.rank, begun, ranks)

    def _own(self) -> Standing:
        return Standing(self.rank, replace(self.pulse, place=self._fixed or self.pulse.place))

    def _host(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        owner = "the launcher" if _agent_hosts() else f"rank 0 ({spot(self.layout, 0)})"
        return f"nothing is known of the others: {owner}, which hosts the store at {address},"

    def _read(self) -> dict[int, Pulse]:
        return {rank: _pulse(told) for rank, told in self._gather("pulse").items()}

    def _gather(self, name: str) -> dict[int, bytes]:
        """What each rank has set under this name, of those that have."""
        assert self.board is not None
        keys = {f"{name}/{rank}": rank for rank in range(self.size)}

        def read(store: dist.Store) -> dict[int, bytes]:
            there = list(keys) if store.check(list(keys)) else [key for key in keys if store.check([key])]
            return {keys[key]: told for key, told in zip(there, store.multi_get(there), strict=True)} if there else {}

        return self.board.ask(read, 10.0)

    def _all_stacks(self) -> dict[int, str]:
        """As far as the ranks have told them."""
        found = {self.rank: self._stacks()}
        try:
            shown = {rank: name.decode() for rank, name in self._gather("shown").items() if rank != self.rank}
            names = sorted(set(shown.values()))
            texts = self._ask(lambda store: [store.get(f"stack/{name}").decode() for name in names]) or []
        except Unreachable:
            return found
        known = dict(zip(names, texts, strict=False))
        return found | {rank: known[name] for rank, name in shown.items() if name in known}

    def _pause(self, seconds: float) -> None:
        """In the thread that beats, keep beating: the others look at this rank too."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.interval)
            if threading.current_thread() is self._thread:
                self._feel()
                self._publish()

    def _speech(self, scene: Scene) -> Failure:
        """The verdict, without text when another rank has said it. Frozen ranks of this machine are ended."""
        found = Failure(text="")
        if self._said() is None:
            found = page.failure(scene, self.run_dir.path, self._all_stacks(), guard.start_id())
        end_frozen(scene.ranks.values(), self.pulse.host)
        return found


def _agent_hosts() -> bool:
    """Whether the store lives in the launcher, else in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _pulse(told: bytes) -> Pulse:
    found = json.loads(told)
    where, pace = found.pop("place"), Paced(**found.pop("pace"))
    return Pulse(**found, pace=pace, place=Place(**where | {"runs": tuple(map(tuple, where["runs"]))}))


def leave(code: int) -> None:
    """End the process whatever its other threads are doing."""
    for stream in (sys.stdout, sys.stderr):
        flushing = threading.Thread(target=stream.flush, daemon=True)  # the main thread may hold its lock
        flushing.start()
        flushing.join(1.0)
    os._exit(code)
