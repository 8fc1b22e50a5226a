from __future__ import annotations

import pytest

from shardforge.families.fingerprint import fingerprint
from shardforge.families.open import open_source
from tests.unit.upcycle import dense


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dense.save(tmp_path_factory.mktemp("dense") / "run", trained=True)


def test_a_fingerprint_does_not_depend_on_the_place(source, tmp_path):
    import shutil

    shutil.copytree(source, tmp_path / "copy")
    assert fingerprint(open_source(source)) == fingerprint(open_source(tmp_path / "copy"))


@pytest.mark.parametrize("changes", [{"ffn": {"kind": "glu", "inner": 25}}, {"model": {"init": {"std": 0.2}}}])
def test_other_shapes_and_other_numbers_have_other_fingerprints(source, tmp_path, changes):
    assert fingerprint(open_source(source)) != fingerprint(open_source(dense.save(tmp_path / "other", **changes)))
