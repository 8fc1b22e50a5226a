from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from shardforge.train import provenance

IDENTITY = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")


def git(folder: Path, *words: str) -> str:
    command = ["git", *IDENTITY, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A committed package; the folder of its source comes back."""
    source = tmp_path / "clone" / "package"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("x = 1\n")
    git(source.parent, "init", "--quiet")
    git(source.parent, "add", ".")
    git(source.parent, "commit", "--quiet", "--message", "x")
    return source


def test_a_clean_clone_is_its_commit(clone):
    assert provenance.code(clone) == {"commit": git(clone, "rev-parse", "HEAD"), "dirty": None}


def test_every_change_has_another_hash(clone):
    hashes = []
    for text in ("x = 2\n", "x = 3\n", "x = 2\n"):
        (clone / "__init__.py").write_text(text)
        hashes.append(provenance.code(clone)["dirty"])
    assert None not in hashes and hashes[0] == hashes[2] != hashes[1]


def test_a_file_that_git_does_not_know_is_a_change(clone):
    hashes = []
    for text in ("a = 1\n", "a = 2\n"):
        (clone / "new_kind.py").write_text(text)
        hashes.append(provenance.code(clone)["dirty"])
    assert None not in hashes and hashes[0] != hashes[1]


def test_changes_outside_the_package_do_not_count(clone):
    (clone.parent / "notes.txt").write_text("x")
    assert provenance.code(clone)["dirty"] is None


@pytest.mark.parametrize("inside", [True, False], ids=["installed below a clone", "nowhere"])
def test_outside_a_clone_there_is_no_commit(clone, tmp_path, inside):
    folder = (clone.parent if inside else tmp_path) / "site-packages"
    folder.mkdir()
    (folder / "__init__.py").touch()
    assert provenance.code(folder) == {"commit": None, "dirty": None}


def test_without_git_there_is_no_commit(clone, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.code(clone) == {"commit": None, "dirty": None}


def test_every_start_adds_an_entry(tmp_path):
    path = tmp_path / "provenance.json"
    for number in range(3):
        provenance.append(path, {"first_step": number})
    assert json.loads(path.read_text()) == [{"first_step": 0}, {"first_step": 1}, {"first_step": 2}]
    assert [each.name for each in tmp_path.iterdir()] == ["provenance.json"]


def test_an_entry_says_what_the_run_was_made_of():
    entry = provenance.start(recipe_hash="r", data="d", seed=3, layout="dp2", first_step=7, device="2 x cpu")
    assert json.loads(json.dumps(entry)) == entry
    given = {"recipe_hash": "r", "data_fingerprint": "d", "seed": 3, "layout": "dp2", "first_step": 7}
    assert entry.items() >= (given | {"device": "2 x cpu"}).items()
    assert entry["packages"].keys() >= {"torch", "numpy"} and entry["host"] and entry["python"]
