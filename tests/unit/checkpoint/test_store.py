from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.staging import Staging
from shardforge.checkpoint.store import Store
from shardforge.core.errors import CheckpointError
from shardforge.core.layout import Layout
from shardforge.recipe.schema import CheckpointConfig
from tests.unit.checkpoint import sharded

WEIGHT = {"shape": [100], "dtype": "float32"}
DESCRIBE = {"model": {"x": WEIGHT}, "recipe": "abc"}


def numbers(value: float) -> dict[str, torch.Tensor]:
    return {"model.x": torch.full((100,), float(value)), "optim.x.step": torch.tensor(float(value))}


@pytest.fixture
def opened(tmp_path) -> Iterator[Callable[..., Store]]:
    """opened(keep_last=1): a store of tmp_path, closed at the end."""
    stores: list[Store] = []

    def make(describe: dict = DESCRIBE, **cfg: object) -> Store:
        stores.append(Store(tmp_path / "checkpoints", CheckpointConfig(**cfg), describe=describe))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """Nothing is written until the event is set."""
    event, put = threading.Event(), tensorfile.put

    def wait(file, block):
        event.wait()
        put(file, block)

    monkeypatch.setattr(tensorfile, "put", wait)
    yield event
    event.set()


def value_of(store: Store, step: int) -> float:
    tensors = numbers(-1)
    store.load(step, tensors)
    assert tensors["model.x"].unique().numel() == 1
    return tensors["model.x"][0].item()


def test_the_newest_step_is_loaded(opened):
    store = opened()
    for step in (1, 3, 2):
        store.save(step, numbers(step), {}, wait=True)
    tensors = numbers(0)
    assert store.load_latest(tensors) == 3
    assert tensors["optim.x.step"].item() == 3


def test_a_run_without_checkpoints_loads_nothing(opened):
    assert opened().load_latest(numbers(0)) is None


def test_a_save_returns_before_anything_is_written(opened, gate):
    store = opened()
    store.save(1, numbers(1), {})
    assert store.committed() == []
    gate.set()
    store.close()
    assert store.committed() == [1]


def test_tensors_may_change_while_they_are_written(opened, gate):
    store, tensors = opened(), numbers(1)
    store.save(1, tensors, {})
    tensors["model.x"].zero_()
    gate.set()
    assert value_of(store, 1) == 1


def test_a_second_save_waits_for_the_first(opened, gate):
    store = opened()
    store.save(1, numbers(1), {})
    second = threading.Thread(target=store.save, args=(2, numbers(2), {}))
    second.start()
    assert [path.name for path in store.path.iterdir()] == ["step-00000001.tmp-0"]
    gate.set()
    second.join()
    store.close()
    assert [value_of(store, step) for step in store.committed()] == [1, 2]


@pytest.mark.parametrize("way", [{"wait": True}, {"asynchronous": False}], ids=str)
def test_a_save_can_be_waited_for(opened, way):
    store = opened(asynchronous=way.get("asynchronous", True))
    store.save(1, numbers(1), {}, wait=way.get("wait", False))
    assert store.committed() == [1]


def test_a_save_that_is_waited_for_copies_nothing(opened, monkeypatch):
    monkeypatch.setattr(Staging, "copy", None)
    store = opened(asynchronous=False)
    store.save(1, numbers(1), {})
    assert value_of(store, 1) == 1


def test_extra_and_description_come_back(opened):
    store = opened()
    store.save(1, numbers(1), {"tokens": 12, "note": ["a"]}, wait=True)
    assert store.extra(1) == {"tokens": 12, "note": ["a"]}
    assert store.description(1) == DESCRIBE | {"torch": torch.__version__}


def test_a_committed_step_is_left_as_it_is(opened):
    store = opened()
    store.save(1, numbers(1), {}, wait=True)
    store.save(1, numbers(2), {}, wait=True)
    assert value_of(store, 1) == 1


def test_a_step_of_another_model_is_not_written_over(opened):
    opened().save(1, numbers(1), {}, wait=True)
    other = opened(describe={"model": {"x": WEIGHT | {"shape": [7]}}})
    with pytest.raises(CheckpointError, match="committed already, for another model"):
        other.save(1, {"model.x": torch.zeros(7)}, {}, wait=True)


def test_old_steps_go_after_a_new_one_is_committed(opened):
    store = opened(keep_last=1, keep_every=4)
    for step in range(2, 12, 2):
        store.save(step, numbers(step), {}, wait=True)
    assert store.committed() == [4, 8, 10]


def test_a_torn_folder_is_named_once_and_ignored(opened, caplog):
    store = opened()
    store.save(1, numbers(1), {}, wait=True)
    (store.path / "step-00000002.tmp-0").mkdir()
    with caplog.at_level(logging.WARNING, "shardforge"):
        assert [store.committed(), store.committed()] == [[1], [1]]
    told = [record.getMessage() for record in caplog.records if record.name == "shardforge.checkpoint"]
    assert [line.count("step-00000002.tmp-0") for line in told] == [1]


def test_a_disk_without_room_is_told_with_both_numbers_before_anything_is_written(opened, monkeypatch):
    store = opened()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(CheckpointError, match="needs 404 B and the disk has 100 B left"):
        store.save(1, numbers(1), {})
    assert list(store.path.iterdir()) == []


def test_an_error_in_the_background_is_raised_by_the_next_call(opened, monkeypatch):
    store = opened()
    monkeypatch.setattr(tensorfile, "put", refuse_to_write)
    store.save(1, numbers(1), {})
    with pytest.raises(CheckpointError, match="Permission denied"):
        store.save(2, numbers(2), {})
    assert list(store.path.iterdir()) == []


def test_after_an_error_the_next_save_works(opened, monkeypatch):
    store = opened()
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "put", refuse_to_write)
        with pytest.raises(CheckpointError):
            store.save(1, numbers(1), {}, wait=True)
    store.save(1, numbers(1), {}, wait=True)
    assert value_of(store, 1) == 1


def refuse_to_write(file, block):
    raise PermissionError(13, "Permission denied", file.name)


@pytest.mark.parametrize("name", ["manifest.json", "COMMITTED"])
def test_a_commit_that_fails_leaves_no_trace(opened, monkeypatch, name):
    store, write_whole = opened(), tensorfile.write_whole
    store.save(1, numbers(1), {}, wait=True)

    def fail(path: Path, content: bytes) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        write_whole(path, content)

    monkeypatch.setattr(tensorfile, "write_whole", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.save(2, numbers(2), {}, wait=True)
    assert [path.name for path in store.path.iterdir()] == ["step-00000001"]


def test_an_old_step_that_cannot_be_deleted_does_not_stop_the_run(opened, monkeypatch, caplog):
    store = opened(keep_last=1)
    store.save(1, numbers(1), {}, wait=True)
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if ".trash-" in str(target):
            raise PermissionError(13, "Permission denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with caplog.at_level(logging.WARNING, "shardforge"):
        store.save(2, numbers(2), {}, wait=True)
    assert store.committed() == [1, 2]
    assert "an old checkpoint cannot be deleted" in caplog.text


@pytest.mark.parametrize("layout", [Layout(), Layout(dp_shard=2, tp=2)], ids=str)
def test_another_models_checkpoint_is_one_error_and_touches_nothing(ranks, tmp_path, layout):
    sharded.save(tmp_path, Layout(), 3)
    args = (sharded.refusal, tmp_path, layout, 16)
    answers = [sharded.refusal(*args[1:])] if layout.world_size == 1 else ranks(4).run(*args)
    told, untouched = answers[0]
    assert "checkpoint of another model or optimizer, 2 tensors differ" in told
    assert "up: [12, 6] float32 in the checkpoint, [16, 6] float32 here" in told
    assert answers == [(told, True)] * layout.world_size
    assert untouched


def test_another_optimizer_is_refused_too(opened):
    store = opened()
    store.save(1, numbers(1), {}, wait=True)
    wanted = {"model.x": torch.zeros(100), "optim.x.momentum_buffer": torch.zeros(100)}
    with pytest.raises(CheckpointError, match=r"optim\.x\.momentum_buffer: absent in the checkpoint"):
        store.load(1, wanted)
    assert wanted["model.x"].sum().item() == 0


def test_the_model_alone_can_be_loaded(opened):
    store, wanted = opened(), {"model.x": torch.zeros(100)}
    store.save(1, numbers(5), {}, wait=True)
    store.load(1, wanted)
    assert wanted["model.x"].unique().tolist() == [5]


@pytest.mark.parametrize("damage", ["index", "file", "missing"])
def test_a_damaged_checkpoint_is_refused_before_any_tensor_is_touched(opened, damage):
    store = opened()
    store.save(1, numbers(1), {}, wait=True)
    folder = store.path / "step-00000001"
    if damage == "index":
        document = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(document, separators=(",", ":")).replace("model.x", "model.y"))
    elif damage == "file":
        with (folder / "rank-00000.safetensors").open("ab") as file:
            file.write(b"x")
    else:
        (folder / "rank-00000.safetensors").unlink()
    tensors = numbers(0)
    with pytest.raises(CheckpointError):
        store.load_latest(tensors)
    assert tensors["model.x"].sum().item() == 0


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_is_never_executed(opened, tmp_path):
    store = opened()
    store.save(1, numbers(1), {}, wait=True)
    for name in (".metadata", "__0_0.distcp", "model.pt", "optimizer.bin", "extra.pkl"):
        (store.path / "step-00000001" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    assert value_of(store, 1) == 1
    assert not (tmp_path / "executed").exists()


def test_a_rank_file_that_is_a_pickle_is_refused_unread(opened, tmp_path):
    store = opened()
    store.save(1, numbers(1), {}, wait=True)
    path = store.path / "step-00000001" / "rank-00000.safetensors"
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    path.write_bytes(bomb.ljust(path.stat().st_size, b"\0"))
    with pytest.raises(CheckpointError):
        store.load(1, numbers(0))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("wanted", ["01", "10"])
def test_ranks_that_hold_different_tensors_save_and_load_them_as_one_model(ranks, tmp_path, wanted):
    assert ranks(2).run(sharded.apart, tmp_path, tuple(wanted)) == [("", True)] * 2


def test_a_tensor_that_no_rank_asks_for_is_named_on_all(ranks, tmp_path):
    for told, _ in ranks(2).run(sharded.apart, tmp_path, ("1", "1")):
        assert "model.0: [3] float32 in the checkpoint, absent here" in told
