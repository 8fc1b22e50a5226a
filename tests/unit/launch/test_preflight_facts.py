from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from shardforge.data import manifest
from shardforge.launch import preflight_facts as facts
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_wanted import Wanted

TABLE = """\
0, GPU-aa11, NVIDIA H100 80GB HBM3, 550.54.15, 4, 0
1, GPU-bb22, NVIDIA H100 80GB HBM3, 550.54.15, 71234, 3
10, GPU-cc33, NVIDIA H100 80GB HBM3, 550.54.15, 0, [N/A]
"""


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi in front of the machine's own."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv(facts.VISIBLE, raising=False)


def test_nvidia_smi_tells_memory_in_bytes_errors_and_driver():
    gpus, driver = facts.parse_smi(TABLE, None)
    assert driver == "550.54.15"
    assert [(gpu.index, gpu.used, gpu.ecc) for gpu in gpus] == [(0, 4 << 20, 0), (1, 71234 << 20, 3), (10, 0, 0)]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("1", [1]), ("0,10", [0, 10]), ("GPU-cc33", [10]), ("GPU-b", [1]), ("", []), ("MIG-1f2e", [0, 1, 10])],
)
def test_only_gpus_of_this_job_are_looked_at(visible, indices):
    assert [gpu.index for gpu in facts.parse_smi(TABLE, visible)[0]] == indices


def test_gpus_come_from_nvidia_smi(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, f"cat <<'X'\n{TABLE}X")
    gpus, driver, error = facts.gpus()
    assert (len(gpus), driver, error) == (3, "550.54.15", "")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'Unable to determine the device handle for GPU0'; exit 15", "nvidia-smi says: Unable to determine"),
        ("exit 9", "nvidia-smi says: exit code 9"),
        ("echo 'hello'", "nvidia-smi answers what is no table of GPUs: hello"),
    ],
)
def test_an_nvidia_smi_that_fails_is_quoted(tmp_path, monkeypatch, script, told):
    smi(tmp_path, monkeypatch, script)
    assert facts.gpus()[2].startswith(told)


def test_memory_of_ranks_that_have_just_ended_is_waited_for(tmp_path, monkeypatch):
    table = tmp_path / "table"
    table.write_text("0, GPU-aa11, H, 550, 70000, 0\n")
    smi(tmp_path, monkeypatch, f"cat {table}")
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            table.write_text("0, GPU-aa11, H, 550, 5, 0\n")

    assert facts.idle_gpus(10 << 20, 15.0, pause)[0][0].used == 5 << 20 and len(looks) == 3


def test_memory_that_stays_taken_is_told_after_a_while(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "echo '0, GPU-aa11, H, 550, 70000, 0'")
    looks: list[float] = []
    assert facts.idle_gpus(10 << 20, 5.0, looks.append)[0][0].used == 70000 << 20 and sum(looks) == 5.0


def test_no_nvidia_smi_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.gpus() == ((), "", "nvidia-smi is not there")


def test_a_written_probe_leaves_nothing(tmp_path):
    speed, error = facts.write_speed(tmp_path / "launch", "n1", 3_000_000)
    assert speed > 0 and error == "" and not list((tmp_path / "launch").iterdir())


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    assert facts.write_speed(tmp_path / "file" / "launch", "n1", 10) == (0.0, os.strerror(errno.ENOTDIR))


def test_a_full_disk_is_said_and_the_probe_is_gone(tmp_path, monkeypatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert facts.write_speed(tmp_path, "n1", 10) == (0.0, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_token_may_appear_while_it_is_looked_for(tmp_path):
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            (tmp_path / "token").touch()

    assert facts.seen(tmp_path / "token", 10.0, pause) and len(looks) == 3


@pytest.mark.parametrize("folder", [".", "not/there"])
def test_a_token_that_does_not_come_is_given_up(tmp_path, folder):
    assert not facts.seen(tmp_path / folder / "token", 2.0, lambda seconds: None)


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/x /shared nfs4 rw 0 0
fast@o2ib:/x /shared/big\\040disk lustre rw 0 0
tmpfs /sharedtoo tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/shared/me/run", "nfs4"),
        ("/shared/big disk/run", "lustre"),
        ("/sharedtoo/run", "tmpfs"),
        ("/srv/run", "ext4"),
    ],
)
def test_the_innermost_mount_tells_the_file_system(monkeypatch, folder, kind):
    monkeypatch.setattr(facts, "nearest", lambda path: path)
    assert facts.filesystem(Path(folder), MOUNTS) == kind


def corpus(folder: Path, digest: str = "ab") -> str:
    """A folder that looks built; its fingerprint."""
    folder.mkdir()
    (folder / "train-0.bin").write_bytes(b"1234")
    shard = manifest.ShardRecord(name="train-0", tokens=2, documents=1, bin_sha256=digest, idx_sha256="i")
    made = manifest.Manifest(
        tokenizer=manifest.TokenizerRecord(file="tokenizer.json", sha256="t", vocab=300, eos=0),
        dtype="uint16",
        splits={"train": (shard,)},
        text_bytes={"train": 4},
        entropy_nats=1.0,
        unigram_nats=None,
    )
    manifest.write(folder, made)
    return manifest.fingerprint(made)


def test_a_corpus_has_the_fingerprint_of_its_manifest(tmp_path):
    one, two = corpus(tmp_path / "one"), corpus(tmp_path / "two", "cd")
    folders = (str(tmp_path / "one"), str(tmp_path / "two"))
    assert facts.corpora(folders) == ({folders[0]: one, folders[1]: two}, {}) and one != two


def test_a_corpus_that_is_not_there_is_said(tmp_path):
    folder = str(tmp_path / "one")
    assert facts.corpora((folder,)) == ({}, {folder: "the folder does not exist"})


def test_a_corpus_without_its_shards_is_said(tmp_path):
    corpus(tmp_path / "one")
    (tmp_path / "one" / "train-0.bin").unlink()
    errors = facts.corpora((str(tmp_path / "one"),))[1]
    assert "train-0.bin" in errors[str(tmp_path / "one")]


def test_all_facts_of_this_machine_cross_the_wire(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, f"cat <<'X'\n{TABLE}X")
    monkeypatch.setattr(facts, "IDLE_S", 0.0)
    corpus(tmp_path / "corpus")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "token").touch()
    wanted = Wanted(nodes=1, gpus=3, data=(str(tmp_path / "corpus"),), config=PreflightConfig(write_bytes=1000))
    found = facts.gather(wanted, tmp_path / "launch", "n1", "token")
    assert facts.from_plain(json.loads(json.dumps(facts.plain(found)))) == found
    assert found.free_disk > 0 < found.free_memory and found.token and len(found.gpus) == 3
    assert {"driver", "python", "torch", "shardforge"} == set(found.versions)


def test_without_a_token_to_look_for_none_is_missing(tmp_path):
    found = facts.gather(Wanted(nodes=1, config=PreflightConfig(write_bytes=10)), tmp_path, "n1", "")
    assert found.token
