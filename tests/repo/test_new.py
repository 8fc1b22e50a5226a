from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STARTED = [("mixer", "my_idea"), ("norm", "calm"), ("schedule", "saw")]
SAME_WEIGHTS = """
import sys
from shardforge.model.build import build
from shardforge.recipe.load import load
sizes = []
for name in ("first", sys.argv[1]):
    recipe = load(name).recipe
    model = build(recipe.model, recipe.objective.build())
    sizes.append({name: weight.shape for name, weight in model.named_parameters()})
assert sizes[0] == sizes[1]
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(shared_workspace: Path, inside) -> Run:
    """Runs the interpreter with a copy of the clone as the clone, in which three new kinds were started."""

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=shared_workspace,
            env=inside(shared_workspace),
        )

    for slot, kind in STARTED:
        done = python("tools/dev/new.py", slot, kind)
        assert done.returncode == 0, done.stderr
    return python


@pytest.mark.parametrize(("slot", "kind"), STARTED)
def test_the_recipe_of_a_new_kind_is_ten_lines_at_most(run: Run, shared_workspace: Path, slot: str, kind: str):
    text = (shared_workspace / "recipes" / "ablations" / f"{slot}-{kind}.yaml").read_text()
    assert f"kind: {kind}" in text and len(text.splitlines()) <= 10


@pytest.mark.parametrize(("slot", "kind"), STARTED)
def test_a_new_kind_starts_with_the_weights_of_the_old_one(run: Run, slot: str, kind: str):
    done = run("-c", SAME_WEIGHTS, f"{slot}-{kind}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "tool",
    [
        ("tools/dev/layers.py",),
        ("tools/dev/size.py",),
        ("tools/dev/zoo_docs.py", "--check"),
        ("-m", "ruff", "format", "--check", "framework/shardforge/model", "framework/shardforge/optim/schedules"),
    ],
    ids=" ".join,
)
def test_a_new_kind_is_green_before_the_first_edit(run: Run, tool: tuple[str, ...]):
    done = run(*tool)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_existing_kind_is_not_overwritten(run: Run, shared_workspace: Path):
    path = shared_workspace / "framework/shardforge/model/mixers/gqa.py"
    before = path.read_text()
    done = run("tools/dev/new.py", "mixer", "gqa")
    assert (done.returncode, path.read_text()) == (2, before) and "exists" in done.stderr


def test_a_mistyped_slot_gets_the_nearest_one(run: Run):
    done = run("tools/dev/new.py", "mixr", "idea")
    assert done.returncode == 2 and "did you mean 'mixer'?" in done.stderr
