from __future__ import annotations

from pathlib import Path

from shardforge.core.rundir import RunDir

NAMES = [name for name, value in vars(RunDir).items() if isinstance(value, property)]


def test_every_file_has_its_own_name_inside_the_run_directory():
    paths = [getattr(RunDir(Path("runs/a")), name) for name in NAMES]
    assert len(set(paths)) == len(NAMES)
    assert {path.parent for path in paths} == {Path("runs/a"), Path("runs/a/launch")}


def test_naming_a_file_creates_nothing(tmp_path: Path):
    for name in NAMES:
        getattr(RunDir(tmp_path / "run"), name)
    assert list(tmp_path.iterdir()) == []
