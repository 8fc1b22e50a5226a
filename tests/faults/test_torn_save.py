from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardforge.checkpoint import folders, state, tensorfile
from shardforge.checkpoint.store import Store
from shardforge.core.errors import CheckpointError
from shardforge.core.layout import Layout
from shardforge.recipe.schema import CheckpointConfig
from tests.ranks import RankFailure, Ranks
from tests.unit.checkpoint import sharded

DP2 = Layout(dp_shard=2)
ON_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """A killed process loses nothing that it has written, synced or not; syncing takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def store(path: Path) -> Store:
    describe = {"model": {"x": {"shape": [1000], "dtype": "float32"}}}
    return Store(path, CheckpointConfig(keep_last=1), describe=describe)


def numbers(step: int) -> dict[str, torch.Tensor]:
    return {"model.x": torch.full((1000,), float(step)), "optim.x.step": torch.tensor(float(step))}


def save_until(path: Path, operation: int) -> None:
    """Commit step 1, then save step 2 and die right before the given operation on a file."""
    keeper = store(path)
    keeper.save(1, numbers(1), {}, wait=True)
    count = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal count
        if event in ON_DISK and str(path) in str(args[0]):
            count += 1
            if count == operation:
                kill()

    sys.addaudithook(watch)
    keeper.save(2, numbers(2), {}, wait=True)
    assert count < operation


def save_half(path: Path, step: int) -> None:
    """Commit the model of seed 1 by two ranks, then begin the next; rank 1 dies when half its bytes are written."""
    net, optimizer = sharded.build(DP2, 1)
    keeper = sharded.store(path, net)
    keeper.save(1, state.collect(net, optimizer), {}, wait=True)
    put = tensorfile.put

    def die(file, block):
        put(file, block[: len(block) // 2])
        file.flush()
        kill()

    if dist.get_rank() == 1:
        tensorfile.put = die
    try:
        keeper.save(step, state.collect(net, optimizer), {}, wait=True)
    except CheckpointError as error:
        (path / "told").write_text(str(error))


def save_on_a_full_disk(path: Path, failing: int) -> tuple[str, list[int], list[str]]:
    """Two ranks, one of which finds no room in the middle of a file: the error, the committed steps, all names."""
    net, optimizer = sharded.build(DP2, 1)
    keeper = sharded.store(path, net)
    keeper.save(1, state.collect(net, optimizer), {}, wait=True)
    put = tensorfile.put

    def fill(file, block):
        put(file, block[: len(block) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    if dist.get_rank() == failing:
        tensorfile.put = fill
    try:
        keeper.save(2, state.collect(net, optimizer), {})
        keeper.save(3, state.collect(net, optimizer), {})
        told = "nothing"
    except CheckpointError as error:
        told = str(error)
    finally:
        tensorfile.put = put
    dist.barrier()
    names = sorted(entry.name for entry in path.iterdir())
    keeper.close()
    return told, folders.committed(path), names


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path, caplog):
    outcomes = []
    for operation in range(1, 1000):
        path = tmp_path / str(operation) / "checkpoints"
        pool = Ranks(1)
        try:
            pool.run(save_until, path, operation)
            break
        except RankFailure as failure:
            assert "died" in str(failure)
        finally:
            pool.stop()
        keeper, tensors = store(path), numbers(0)
        step = keeper.load_latest(tensors)
        assert tensors["model.x"].unique().tolist() == [step]
        torn = {entry.name for entry in folders.torn(path)}
        assert all(name in caplog.text for name in torn)
        keeper.save(3, numbers(3), {}, wait=True)
        assert [entry.name for entry in path.iterdir()] == ["step-00000003"]
        keeper.close()
        outcomes.append((step, bool(torn)))
    assert set(outcomes) == {(1, False), (1, True), (2, False)}
    assert outcomes == sorted(outcomes)


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "checkpoints"
    with pytest.raises(RankFailure):
        Ranks(2).run(save_half, path, 2)
    assert sharded.differing(path, Layout(), 1) == []


def test_the_other_ranks_are_told_that_one_is_lost(tmp_path):
    path = tmp_path / "checkpoints"
    with pytest.raises(RankFailure):
        Ranks(2).run(save_half, path, 2)
    assert "a rank was lost" in (path / "told").read_text()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_rank_is_one_error_on_all_and_keeps_the_last_good_step(ranks, tmp_path, failing):
    path = tmp_path / "checkpoints"
    answers = ranks(2).run(save_on_a_full_disk, path, failing)
    assert f"No space left on device (rank {failing})" in answers[0][0]
    assert answers == [(answers[0][0], [1], ["step-00000001"])] * 2
    assert sharded.differing(path, Layout(), 1) == []
