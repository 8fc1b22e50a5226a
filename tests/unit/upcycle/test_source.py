from __future__ import annotations

import pytest

from shardforge.families.open import open_source
from shardforge.upcycle.source import fingerprint, mismatches
from tests.unit.upcycle import dense


def test_a_source_matches_itself(source):
    assert list(mismatches(open_source(source), "here")) == []


def test_a_fingerprint_does_not_depend_on_the_place(source, tmp_path):
    import shutil

    shutil.copytree(source, tmp_path / "copy")
    assert fingerprint(open_source(source)) == fingerprint(open_source(tmp_path / "copy"))


@pytest.mark.parametrize("changes", [{"ffn": {"kind": "glu", "inner": 25}}, {"model": {"init": {"std": 0.2}}}])
def test_other_shapes_and_other_numbers_have_other_fingerprints(source, tmp_path, changes):
    assert fingerprint(open_source(source)) != fingerprint(open_source(dense.save(tmp_path / "other", **changes)))
