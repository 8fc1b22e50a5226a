"""A rank that dies, hangs or goes astray: one message that names it and the collective, no process left, and a run that
goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from shardforge.checkpoint import folders
from shardforge.checkpoint.store import Store
from shardforge.data.loader import Loader
from shardforge.observe.jsonl import Tail
from shardforge.train import pace
from shardforge.train.signals import StopRequests
from tests.faults import runs
from tests.faults.runs import Ended

pytestmark = pytest.mark.slow

PATIENT = {"steps": 10**6, "sequences": 4, "seq_len": 16, "eval_sequences": 0, "timeout": 60}
HASTY = PATIENT | {"timeout": 3}
LAST = 3
"""The step in which something happens."""
Fault = Callable[[], None]


class Job:
    """Ranks of one run in forked processes, started as torchrun or srun would; `hosted` is where their store is."""

    def __init__(self, folder: Path, recipe: Path, size: int, faults: dict[int, Fault], hosted: str):
        self.folder, self.run_dir = folder, folder / "run"
        self.store = (
            dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if hosted == "agent" else None
        )
        self.env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.store.port if self.store else _free_port())}
        self.env |= {"WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": str(hosted == "agent")}
        self.env |= {"SHARDFORGE_START": f"{folder}"}
        self.ranks: list[BaseProcess] = []
        for rank in range(size):
            (folder / f"rank{rank}").mkdir()
            prepare = self._prepare(rank, faults.get(rank, lambda: None))
            self.ranks.append(runs.fork(folder / f"rank{rank}", "train", str(recipe), prepare=prepare))

    def _prepare(self, rank: int, fault: Fault) -> Fault:
        def prepare() -> None:
            os.environ.update(self.env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            torch.set_num_threads(1)
            fault()

        return prepare

    def begun(self, rank: int) -> psutil.Process:
        """The process of a rank of a run that is at work and has saved."""
        deadline = time.monotonic() + runs.PATIENCE_S
        while len(runs.losses(self.run_dir)) < LAST or not folders.committed(self.run_dir / "checkpoints"):
            assert all(each.is_alive() for each in self.ranks) and time.monotonic() < deadline, self.ended()
            time.sleep(0.01)
        return psutil.Process(self.ranks[rank].pid)

    def ended(self) -> list[Ended]:
        """Every rank once all have ended by themselves."""
        for each in self.ranks:
            each.join(runs.PATIENCE_S)
        out = []
        for rank, each in enumerate(self.ranks):
            assert each.exitcode is not None, f"rank {rank} is still there"
            texts = [(self.folder / f"rank{rank}" / f"child.{name}").read_text() for name in ("out", "err")]
            out.append(Ended(each.exitcode, *texts))
        return out


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextmanager
def job(folder: Path, layout: dict[str, int], faults: dict[int, Fault], *, hasty: bool, hosted: str) -> Iterator[Job]:
    recipe = runs.write_recipe(folder, parallel=layout, train=HASTY if hasty else PATIENT)
    started = Job(folder, recipe, 2, faults, hosted)
    try:
        yield started
    finally:
        for each in started.ranks:
            each.kill()
            each.join()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Job]]:
    """start(layout, {rank: fault}): the ranks of that layout, of which some do something wrong."""
    open_jobs = []

    def begin(
        layout: dict[str, int], faults: dict[int, Fault] | None = None, *, hasty: bool = True, hosted: str = "agent"
    ) -> Job:
        context = job(tmp_path, layout, faults or {}, hasty=hasty, hosted=hosted)
        open_jobs.append(context)
        return context.__enter__()

    yield begin
    for context in open_jobs:
        context.__exit__(None, None, None)


def in_step(step: int, place: type, name: str, fault: Callable[..., None]) -> Fault:
    """Something else instead of the method of a class, in one step."""

    def prepare() -> None:
        method, calls = getattr(place, name), 0

        def strange(self, *args):
            nonlocal calls
            calls += 1
            if calls == step:
                fault(self)
            return method(self, *args)

        setattr(place, name, strange)

    return prepare


def sleeps(loader: Loader) -> None:
    threading.Event().wait()


def fails(loader: Loader) -> None:
    raise ValueError("a bug of one rank")


def slowly(store: Store) -> None:
    time.sleep(3)


def goes_astray(stop: StopRequests) -> None:
    dist.barrier(group=stop.group)


def verdict(job: Job) -> str:
    """The one message of all ranks that ended; none of them with 0."""
    ended = job.ended()
    told = "".join(each.err for each in ended)
    assert all(each.code != 0 for each in ended), ended
    assert told.count("error:") == 1 and "Traceback" not in told, told
    return told[told.index("error:") :]


def record(job: Job) -> dict:
    """What the launcher reads: cause, step, node and the ranks to blame."""
    said = json.loads((job.run_dir / "failure.json").read_text())
    assert said["start"] == str(job.folder) and said["code"] == 1
    found = {name: said[name] for name in ("cause", "step", "node")}
    return found | {"ranks": [each["rank"] for each in said["blamed"]]}


def stacks(job: Job) -> dict[str, str]:
    """verdict.txt: the heading of each stack and the stack below it."""
    parts = (job.run_dir / "verdict.txt").read_text().split("\n\n")
    found = [part.partition("\n") for part in parts if "stack of rank" in part.partition("\n")[0]]
    return {head: below for head, _, below in found}


def goes_on(ranks, job: Job) -> None:
    """The run resumes from its last checkpoint."""
    steps = folders.committed(job.run_dir / "checkpoints")
    last, recipe = steps[-1], str(job.run_dir / "recipe.yaml")
    assert ranks(2).run(runs.turn, recipe, f"train.steps={last + 2}") == ["finished"] * 2
    assert folders.committed(job.run_dir / "checkpoints")[-1] == last + 2


@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"tp": 2}], ids=["dp2", "tp2"])
def test_a_killed_rank_is_named_with_the_collective_that_lost_it(ranks, start, layout):
    axis = "dp" if "dp_shard" in layout else "tp"
    job = start(layout, hasty=False)
    job.begun(1).kill()
    told = verdict(job)
    assert re.search(rf"rank 0 \({axis}0\) lost contact in \w+ over {axis} .*step \d+ .*for rank 1 \({axis}1\)\n", told)
    assert re.search(rf"rank 1 \({axis}1\) is dead: process \d+ on \S+ is gone", told)
    assert record(job) | {"step": 0} == {"cause": "dead", "step": 0, "node": None, "ranks": [1]}
    goes_on(ranks, job)


def test_a_stopped_rank_is_named_as_frozen_and_ended(ranks, start):
    job = start({"dp_shard": 2})
    job.begun(1).suspend()
    told = verdict(job)
    assert re.search(r"rank 0 \(dp0\) waited \d+ s in \w+ over dp .*for rank 1 \(dp1\)\n", told)
    assert "rank 1 (dp1) is frozen: process" in told and "was stopped by a signal" in told
    assert job.ranks[1].exitcode == -signal.SIGKILL
    assert record(job) | {"step": 0} == {"cause": "frozen", "step": 0, "node": None, "ranks": [1]}
    assert "no stack of rank 1 (dp1)" in stacks(job)
    goes_on(ranks, job)


def test_a_rank_that_hangs_in_its_data_is_named_with_the_place(ranks, start):
    job = start({"dp_shard": 2}, {1: in_step(LAST, Loader, "_make", sleeps)})
    told = verdict(job)
    assert re.search(r"rank 0 \(dp0\) waited \d+ s in \w+ over dp in forward of step 3 .*for rank 1 \(dp1\)\n", told)
    place = r"data/loader.py:\d+ in batch, in \S*threading.py:\d+ in wait in reading data of step 3"
    assert re.search(rf"rank 1 \(dp1\) is elsewhere: for \d+ s in {place}", told)
    assert record(job) == {"cause": "hang", "step": LAST, "node": None, "ranks": [1]}
    found = stacks(job)
    assert re.search(r"data/loader.py:\d+ in batch\n.*in wait$", found["stack of rank 1 (dp1)"], re.DOTALL)
    assert re.search(r"engine/native.py:\d+ in .* in all_reduce", found["stack of rank 0 (dp0)"], re.DOTALL)
    goes_on(ranks, job)


def test_ranks_in_different_collectives_are_named_with_both(ranks, start):
    job = start({"dp_shard": 2}, {1: in_step(LAST, StopRequests, "agreed", goes_astray)})
    told = verdict(job)
    assert "all_reduce over dp in the agreement on a stop of step 3 at train/signals.py" in told
    assert record(job)["cause"] == "order" and record(job)["step"] == LAST
    assert "barrier over dp in step 3" in told and re.search(r"rank [01] \(dp[01]\) is in another collective: ", told)
    goes_on(ranks, job)


def test_without_the_store_of_the_first_rank_the_verdict_says_so(ranks, start):
    job = start({"dp_shard": 2}, hasty=False, hosted="rank 0")
    job.begun(0).kill()
    told = verdict(job)
    assert re.search(r"rank 1 \(dp1\) lost contact in \w+ over dp", told)
    assert "rank 0 (dp0), which hosts the store at localhost:" in told and "is gone" in told
    assert record(job)["cause"] == "lost"
    goes_on(ranks, job)


@pytest.mark.parametrize("hosted", ["agent", "rank 0"])
def test_a_bug_of_one_rank_ends_all_with_its_traceback(ranks, start, hosted):
    job = start({"dp_shard": 2}, {1: in_step(LAST, Loader, "_make", fails)}, hasty=False, hosted=hosted)
    ended = job.ended()
    told = "".join(each.err for each in ended)
    assert [each.code for each in ended] == [1, 1]
    assert told.count("Traceback") == 1 and "rank 1 (dp1) failed:" in told and "a bug of one rank" in told
    assert "error:" not in told.replace("ValueError:", "")
    assert record(job) == {"cause": "error", "step": LAST, "node": None, "ranks": [1]}
    goes_on(ranks, job)


def test_a_save_in_flight_is_committed_when_another_rank_fails(ranks, start):
    """Rank 1 fails in the step after a save, while rank 0 has yet to commit that save."""
    faults = {0: in_step(LAST, Store, "_commit", slowly), 1: in_step(LAST + 1, Loader, "_make", fails)}
    job = start({"dp_shard": 2}, faults, hasty=False)
    assert [each.code for each in job.ended()] == [1, 1]
    assert folders.committed(job.run_dir / "checkpoints")[-1] == LAST
    goes_on(ranks, job)


def works_slowly() -> None:
    """A rank that needs a third of a second more for each batch; comparisons come often."""
    often()
    batch = Loader.batch
    Loader.batch = lambda loader, step: time.sleep(0.3) or batch(loader, step)


def often() -> None:
    pace.REVIEW_S = 2.0


def test_a_slow_rank_is_named_with_its_node_in_the_metrics(start):
    job = start({"dp_shard": 2}, {0: often, 1: works_slowly}, hasty=False)
    deadline = time.monotonic() + runs.PATIENCE_S
    found: list[dict] = []
    job.begun(1)
    while not found:
        assert all(each.is_alive() for each in job.ranks) and time.monotonic() < deadline, job.ended()
        events = Tail(job.run_dir / "metrics.jsonl").new()
        found = [slow for event in events for slow in event.get("slow", ()) if slow["measure"] == "work"]
    assert {(each["rank"], each["place"], each["node"]) for each in found} == {(1, "dp1", socket.gethostname())}


def test_ranks_whose_launcher_was_killed_save_and_stop(ranks, tmp_path):
    recipe, run_dir = str(runs.write_recipe(tmp_path, parallel={"tp": 2}, train=PATIENT)), tmp_path / "run"
    with runs.shardforge(tmp_path, "train", recipe) as command:
        command.until(lambda: len(runs.losses(run_dir)) >= LAST)
        everyone = psutil.Process(command.process.pid).children(recursive=True)
        command.process.kill()
        _, left = psutil.wait_procs(everyone, timeout=runs.PATIENCE_S)
        for each in left:
            each.kill()
        command.ended()
    assert left == []
    (step,) = folders.committed(run_dir / "checkpoints")[-1:]
    assert f'"state": "stopped", "step": {step}' in (run_dir / "stopped.json").read_text()
    last = f"train.steps={step + 1}"
    assert ranks(2).run(runs.turn, recipe, last) == ["finished"] * 2
