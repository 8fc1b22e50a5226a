from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from tools.dev.layers import FRAMEWORK, OPTIONAL, ROOT

IMPORT_ALL_WITHOUT_EXTRAS = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({sorted(OPTIONAL)!r}))  # None there means: not installed
import shardforge
failed = []
for found in pkgutil.walk_packages(shardforge.__path__, "shardforge."):
    if found.name == "shardforge.__main__":
        continue
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        failed.append(f"{{found.name}}: {{error}}")
sys.exit("\\n".join(failed) or None)
"""


def extras_asked_for() -> dict[str, set[str]]:
    """Extra -> files, from every `require(..., extra="...")` in the framework."""
    found: dict[str, set[str]] = {}
    for path in FRAMEWORK.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "require":
                for keyword in node.keywords:
                    if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant):
                        found.setdefault(str(keyword.value.value), set()).add(path.name)
    return found


def test_every_module_imports_without_any_optional_package(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL_WITHOUT_EXTRAS], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_every_extra_an_error_message_names_exists():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras_asked_for()) - set(declared) == set()
