from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardforge.checkpoint import folders
from shardforge.core.errors import CheckpointError
from shardforge.recipe.schema import CheckpointConfig


def commit(root: Path, *steps: int) -> None:
    for step in steps:
        folders.commit(folders.open_attempt(root, step), step, {"step": step, "files": []})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_only_a_marked_folder_is_committed(tmp_path):
    commit(tmp_path, 3, 12)
    (tmp_path / "step-00000020").mkdir()
    folders.open_attempt(tmp_path, 30)
    assert folders.committed(tmp_path) == [3, 12]


def test_steps_are_in_the_order_of_numbers(tmp_path):
    commit(tmp_path, 100_000_000, 99_999_999)
    assert folders.committed(tmp_path) == [99_999_999, 100_000_000]


def test_a_folder_that_does_not_exist_has_no_steps(tmp_path):
    assert (folders.committed(tmp_path / "no"), folders.torn(tmp_path / "no")) == ([], [])


def test_what_is_not_ours_is_neither_committed_nor_torn(tmp_path):
    for name in ("step-1", "step-00000001.bak", "notes", "step-00000001.tmp-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / folders.MARKER).touch()
    assert (folders.committed(tmp_path), folders.torn(tmp_path)) == ([], [])


def test_every_attempt_has_a_new_folder(tmp_path):
    assert [folders.open_attempt(tmp_path, 5).name for _ in range(3)] == [f"step-00000005.tmp-{n}" for n in range(3)]


def test_a_torn_folder_of_the_same_step_gives_way(tmp_path):
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "old").touch()
    commit(tmp_path, 7)
    assert names(tmp_path) == ["step-00000007"]
    assert names(tmp_path / "step-00000007") == ["COMMITTED", "manifest.json"]


def test_a_manifest_comes_back(tmp_path):
    commit(tmp_path, 4)
    assert folders.read_manifest(tmp_path / "step-00000004") == {"step": 4, "files": []}


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    commit(tmp_path, 4)
    path = tmp_path / "step-00000004" / "manifest.json"
    path.write_text(path.read_text().replace("4", "5"))
    with pytest.raises(CheckpointError, match="not the one that was committed"):
        folders.read_manifest(path.parent)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 4, "manifest": null}'])
def test_a_damaged_marker_is_refused(tmp_path, text):
    commit(tmp_path, 4)
    (tmp_path / "step-00000004" / folders.MARKER).write_text(text)
    with pytest.raises(CheckpointError):
        folders.read_manifest(tmp_path / "step-00000004")


@pytest.mark.parametrize("name", ["COMMITTED", "manifest.json"])
def test_a_missing_part_is_named(tmp_path, name):
    commit(tmp_path, 4)
    (tmp_path / "step-00000004" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        folders.read_manifest(tmp_path / "step-00000004")


@pytest.mark.parametrize(
    ("cfg", "kept"),
    [
        ({"keep_last": 1}, [50]),
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 50]),
    ],
    ids=str,
)
def test_retention_keeps_the_newest_and_the_multiples(tmp_path, cfg, kept):
    commit(tmp_path, 10, 20, 30, 40, 50)
    folders.retire(tmp_path, CheckpointConfig(**cfg))
    assert folders.committed(tmp_path) == kept


def test_retention_removes_the_remains_of_killed_runs_and_nothing_else(tmp_path):
    commit(tmp_path, 10)
    folders.open_attempt(tmp_path, 8)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / ".trash-step-00000001").mkdir()
    (tmp_path / "mine").mkdir()
    folders.retire(tmp_path, CheckpointConfig())
    assert names(tmp_path) == ["mine", "step-00000010"]


def test_a_half_deleted_checkpoint_does_not_look_like_one(tmp_path, monkeypatch):
    commit(tmp_path, 10, 20)
    real = folders.shutil.rmtree

    def stop(path: Path, **options: bool) -> None:
        if path.exists():
            raise OSError(5, "killed here")
        real(path, **options)

    monkeypatch.setattr(folders.shutil, "rmtree", stop)
    with pytest.raises(OSError, match="killed here"):
        folders.retire(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == [".trash-step-00000010", "step-00000020"]


def test_clearing_a_failed_save_leaves_a_committed_step(tmp_path):
    commit(tmp_path, 6)
    attempt = folders.open_attempt(tmp_path, 6)
    folders.clear(tmp_path, 6, attempt)
    assert names(tmp_path) == ["step-00000006"]


def test_the_marker_vouches_for_the_step(tmp_path):
    commit(tmp_path, 6)
    assert json.loads((tmp_path / "step-00000006" / folders.MARKER).read_text())["step"] == 6
