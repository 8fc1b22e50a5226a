from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "framework", "kernels", "recipes", "slurm", "tools")
pytestmark = pytest.mark.slow


def pip(*arguments: str | Path, cwd: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps", "--no-index"], check=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the clone."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, source / part)
    pip("wheel", "--no-build-isolation", "--wheel-dir", "dist", ".", cwd=source)
    return next((source / "dist").glob("shardforge-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", target, wheel, cwd=target)
    return target


def python(installed: Path, elsewhere: Path, *arguments: str) -> str:
    """Standard output of the interpreter that sees the installed wheel first and stands outside the clone."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def relative(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder", ["recipes", "slurm"])
def test_the_wheel_holds_every_template(installed: Path, folder: str):
    assert relative(installed / "shardforge" / f"_{folder}") == relative(ROOT / folder)


def test_the_wheel_holds_every_module_and_page(wheel: Path):
    kinds = (".py", ".html", ".css", ".js")
    files = [path for path in (ROOT / "framework").rglob("*") if path.suffix in kinds]
    expected = {str(path.relative_to(ROOT / "framework")) for path in files}
    expected |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_the_wheel_holds_nothing_else(wheel: Path):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"shardforge", "shardforge_kernels"}


def test_the_installed_wheel_answers_help_outside_the_clone(installed: Path, tmp_path: Path):
    assert "commands:" in python(installed, tmp_path, "-m", "shardforge", "--help")


def test_the_installed_wheel_is_the_one_that_answers(installed: Path, tmp_path: Path):
    where = python(installed, tmp_path, "-c", "import shardforge; print(shardforge.__file__)")
    assert Path(where.strip()).is_relative_to(installed)


def test_a_shipped_recipe_is_found_by_name_outside_the_clone(installed: Path, tmp_path: Path):
    shown = python(installed, tmp_path, "-m", "shardforge", "show", "first")
    assert "name: first" in shown and str(ROOT) not in shown
