from __future__ import annotations

import importlib
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardforge.core.errors import LaunchError
from shardforge.core.slots import observers
from shardforge.observe.base import EvalReport
from shardforge.observe.kinds.tensorboard import TensorBoardConfig
from shardforge.observe.kinds.wandb import WandbConfig


@pytest.fixture
def proxy() -> Iterator[socket.socket]:
    """A port of this machine to which every request to the world would go; nobody answers there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.fixture
def offline(tmp_path: Path, proxy: socket.socket, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return proxy


def wandb_life(info, make_report, steps) -> None:
    observer = WandbConfig(mode="offline", project="pretraining").build()
    observer.on_start(info)
    for step in steps:
        observer.on_step(make_report(step))
    observer.on_eval(EvalReport(step=steps[-1], loss=2.5, tokens=7))
    observer.on_checkpoint(steps[-1], info.path)
    observer.on_end("finished")


def records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes of header, then 32 KiB blocks of (crc, length, type) and payload."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            return
        payload = data[place + 7 : place + 7 + size]
        whole = payload if kind in (1, 2) else whole + payload
        place += 7 + size
        if kind in (1, 4):
            yield whole


def test_wandb_offline_writes_every_value_below_the_run_and_asks_nobody(tmp_path, offline, make_info, make_report):
    wandb = pytest.importorskip("wandb")
    protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    wandb_life(make_info(), make_report, [1, 2])
    wandb_life(make_info(first_step=2), make_report, [3])
    wandb.teardown()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    rows, ids, configs = [], set(), []
    for raw in (raw for path in files for raw in records(path)):
        record = protocol.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
        if kind == "run":
            ids.add(record.run.run_id)
            configs += [item.key for item in record.run.config.update]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [9.0, 8.0, 7.0]
    assert [row for row in rows if "held_out/loss" in row] == [
        {"step": 2, "held_out/loss": 2.5}, {"step": 3, "held_out/loss": 2.5},
    ]  # fmt: skip
    assert ids == {(tmp_path / "wandb" / "id").read_text()}, "a resumed run goes on under its id"
    assert {"seed", "run"} <= set(configs)
    with pytest.raises(BlockingIOError):
        offline.accept()


def test_wandb_online_without_an_account_says_what_to_do(offline, make_info, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(LaunchError, match="No API key") as caught:
        WandbConfig().build().on_start(make_info())
    assert (caught.value.where, "mode: offline" in caught.value.fix) == ("observe", True)


@pytest.mark.parametrize(
    ("config", "module"), [(WandbConfig(), "wandb"), (TensorBoardConfig(), "tensorboard")], ids=["wandb", "tensorboard"]
)
def test_a_missing_package_is_named_with_its_extra(config, module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(importlib.sys.modules, module, None)
    with pytest.raises(LaunchError) as caught:
        config.build()
    assert (caught.value.where, caught.value.fix) == ("observe", f"pip install 'shardforge[{module}]'")


def test_both_kinds_are_found_by_name():
    assert observers.kinds() == {"tensorboard": TensorBoardConfig, "wandb": WandbConfig}


def test_tensorboard_reads_every_value_back_and_a_resumed_run_replaces_its_tail(tmp_path, make_info, make_report):
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    for first, steps, loss in ((0, (1, 2, 3), 5.0), (2, (3, 4), 6.0)):
        observer = TensorBoardConfig().build()
        observer.on_start(make_info(first_step=first))
        for step in steps:
            observer.on_step(make_report(step, loss=loss))
        observer.on_eval(EvalReport(step=steps[-1], loss=2.5, tokens=7))
        observer.on_checkpoint(steps[-1], tmp_path)
        observer.on_end("finished")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 5.0), (2, 5.0), (3, 6.0), (4, 6.0)]
    assert [(e.step, e.value) for e in events.Scalars("held_out/loss")] == [(4, 2.5)]
    assert "speed/peak_share" in events.Tags()["scalars"]
