from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORK = ROOT / "framework" / "shardforge"
FOLDERS = (".ci", "framework", "kernels", "tools", "tests", "recipes", "slurm", "docs")
TEXT = {"", ".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".sbatch", ".html", ".css", ".js", ".json"}
AT_THE_ROOT = {
    *("pyproject.toml", "framework", "kernels", "recipes", "tools", "tests", "slurm", "docs"),
    *("README.md", "Makefile", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
}
MADE_BY_TOOLS = {"build", "dist", "runs", "data"}

# Spelled in two halves so that this file does not find itself.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(" + "|".join(("ro" + "ot", "wo" + "rk", "ho" + "me", "tm" + "p")) + r")/")

# Where a DTensor's own part may be touched. Everything else reads weights through nn.module.local().
TO_LOCAL = {
    "nn/module.py": "the one reader of weights in a forward pass",
    "checkpoint/staging.py": "copies what this rank holds; nothing is computed with it",
    "checkpoint/state.py": "names what this rank holds; nothing is computed with it",
}


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the repository that people wrote, as (path, content)."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != "LICENSE"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted(found):
        skipped = any(part == "__pycache__" or part.endswith(".egg-info") for part in path.parts)
        if path.suffix in TEXT and not skipped:
            yield str(path.relative_to(ROOT)), path.read_text()


def places(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_is_named_after_nothing():
    homeless = {"utils", "util", "common", "helpers", "helper", "misc", "v2"}
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    assert [str(path) for path in paths if path.stem in homeless] == []


def test_the_root_holds_only_what_the_map_names():
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert here - AT_THE_ROOT - MADE_BY_TOOLS == set()


def test_recipes_and_slurm_hold_no_python():
    assert [str(path) for folder in ("recipes", "slurm") for path in (ROOT / folder).rglob("*.py")] == []


def test_weights_are_read_through_local_only():
    found = {
        str(path.relative_to(FRAMEWORK)) for path in FRAMEWORK.rglob("*.py") if ".to_" + "local(" in path.read_text()
    }
    assert found - set(TO_LOCAL) == set()


def test_every_exception_to_the_one_reader_is_still_needed():
    unused = [name for name in TO_LOCAL if ".to_" + "local(" not in (FRAMEWORK / name).read_text()]
    assert unused == []


def test_nothing_is_left_unfinished():
    assert places(UNFINISHED) == []


def test_no_file_names_a_path_of_one_machine():
    assert places(MACHINE_PATH) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/wo" + "rk/data/x.bin", True),
        ("run_dir: '/ho" + "me/me/runs'", True),
        ("docs/wo" + "rk/x.md", False),
        ("$SCRATCH/tm" + "p/x", False),
        ("~/wo" + "rk/x", False),
    ],
)
def test_a_machine_path_is_told_from_a_relative_one(line: str, found: bool):
    assert bool(MACHINE_PATH.search(line)) is found


def test_package_files_hold_no_logic():
    allowed = (ast.Expr, ast.Assign, ast.AnnAssign)
    with_logic = [
        str(path.relative_to(ROOT))
        for path in (*FRAMEWORK.rglob("__init__.py"), *(ROOT / "kernels").rglob("__init__.py"))
        if not all(isinstance(node, allowed) for node in ast.parse(path.read_text()).body)
    ]
    assert with_logic == []


def test_no_field_or_argument_is_a_switch_by_name():
    switch = re.compile(r"(use|enable|disable)_")
    found = []
    for path in FRAMEWORK.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ""
            if isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            if switch.match(name):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert found == []


def test_a_decision_is_numbered_once_and_named_by_its_title():
    names = [path.name for path in (ROOT / "docs" / "decisions").glob("*")]
    assert [name for name in names if not re.fullmatch(r"\d{4}-[a-z0-9]+(-[a-z0-9]+)*\.md", name)] == []
    assert len({name[:4] for name in names}) == len(names)
