from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.bench import upcycle
from shardforge.core.errors import ForgeError
from shardforge.families.open import open_source
from shardforge.upcycle.options import read_options
from shardforge.upcycle.run import upcycle as make
from shardforge.upcycle.source import mismatches

SMALL = upcycle.Size(layers=1, hidden=128, inner=64, experts=2, dtype="bf16")


def test_the_source_is_a_dense_model_of_its_size(tmp_path):
    upcycle.write_source(tmp_path / "source", SMALL)
    source = open_source(tmp_path / "source")
    assert list(mismatches(source, "here")) == []
    assert source.names["blocks.0.ffn.gate.weight"].shape == (64, 128)
    assert source.names["blocks.0.ffn.gate.weight"].dtype == "bfloat16"


def test_a_pair_is_told_and_no_file_stays(tmp_path):
    told: list[str] = []
    given = read_options(flags={"experts": 2, "k": 1})

    def made(source: Path, output: Path) -> object:
        return make(source, output, given, processes=1)

    assert upcycle.run(made, SMALL, 2, tmp_path, told.append) > 0
    assert len(told) == 2 and all("ratio" in line for line in told)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_first(tmp_path):
    huge = upcycle.Size(layers=10**9, hidden=4096, inner=16384, experts=64, dtype="fp32")
    with pytest.raises(ForgeError, match="the disk has") as found:
        upcycle.run(lambda source, output: None, huge, 1, tmp_path, print)
    assert "--layers" in found.value.fix and list(tmp_path.iterdir()) == []
