from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.bench import convert, upcycle
from shardforge.convert.format import Options
from shardforge.convert.run import convert as make
from shardforge.core.errors import ForgeError

SMALL = upcycle.Size(layers=1, hidden=128, inner=64, experts=1, dtype="bf16")


def test_both_directions_are_told_and_no_file_stays(tmp_path):
    told: list[str] = []

    def made(source: Path, target: Path, to: str) -> object:
        return make(source, target, Options(to=to), proof="none", processes=1)

    assert convert.run(made, SMALL, 2, tmp_path, told.append) > 0
    assert ["to shardforge" in line for line in told] == [True, True, False, False]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_first(tmp_path):
    huge = upcycle.Size(layers=10**9, hidden=4096, inner=16384, experts=1, dtype="fp32")
    with pytest.raises(ForgeError, match="the disk has") as found:
        convert.run(lambda source, target, to: None, huge, 1, tmp_path, print)
    assert "--layers" in found.value.fix and list(tmp_path.iterdir()) == []
