from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("framework", "kernels", "recipes", "slurm", "tests", "tools", "docs", "pyproject.toml")


def copy_of_the_clone(target: Path) -> Path:
    """Everything a document or a tool may add files to."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in COPIED:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=ignored)
        else:
            shutil.copy(source, target / part)
    return target


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return copy_of_the_clone(tmp_path)


@pytest.fixture(scope="module")
def shared_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for all tests of a file, which build on each other's additions."""
    return copy_of_the_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="session")
def inside() -> Callable[[Path], dict[str, str]]:
    """Environment in which `folder` is the clone: its packages and the commands of this interpreter come first."""

    def environment(folder: Path) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(str(folder / part) for part in ("framework", "kernels", ".")),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
            "OMP_NUM_THREADS": "1",
        }

    return environment
