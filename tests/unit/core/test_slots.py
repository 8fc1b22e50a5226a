from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardforge.core.errors import RecipeError
from shardforge.core.slots import Slot

KIND = """
from dataclasses import dataclass
from {package}_slot import slot

@slot.register("{kind}")
@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 1
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slot]:
    """A slot whose folder has the kinds "round" and "flat"."""
    package = "shelf_of_kinds"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").touch()
    (tmp_path / f"{package}_slot.py").write_text(
        f"from shardforge.core.slots import Slot\nslot = Slot('shape', '{package}')\n"
    )
    for kind in ("round", "flat"):
        (folder / f"{kind}.py").write_text(KIND.format(package=package, kind=kind))
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__(f"{package}_slot").slot
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]


def test_folder_is_the_registry(shelf: Slot):
    assert list(shelf.kinds()) == ["flat", "round"]


def test_kind_knows_its_name(shelf: Slot):
    assert shelf["round"].kind == "round"


def test_unknown_kind_names_the_nearest(shelf: Slot):
    with pytest.raises(RecipeError) as caught:
        shelf["ruond"]
    assert str(caught.value) == "shape  no shape is called 'ruond'\n    fix: did you mean 'round'?"


def test_two_files_cannot_claim_one_kind(shelf: Slot, tmp_path: Path):
    (tmp_path / "shelf_of_kinds" / "second.py").write_text(KIND.format(package="shelf_of_kinds", kind="flat"))
    with pytest.raises(RecipeError) as caught:
        shelf.kinds()
    assert str(caught.value) == (
        "shelf_of_kinds.flat and shelf_of_kinds.second  shape 'flat' is defined twice\n    fix: rename one of them"
    )
