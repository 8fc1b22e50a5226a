"""Every family through the whole of `shardforge convert`: to ours, back, and proved with transformers on both ways."""

from __future__ import annotations

import pytest
import torch

from tests.parity.compare import quiet
from tests.parity.test_families import CASES, tensors, their_model
from tests.unit.convert.folders import converted

pytest.importorskip("transformers", reason="the transformers package is the reference")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_a_family_comes_back_to_the_bit_and_transformers_proves_both_ways(name, tmp_path):
    with quiet():
        their_model(CASES[name]).save_pretrained(tmp_path / "theirs")
        CASES[name].stored(tmp_path / "theirs")
        ours = converted(tmp_path / "theirs", tmp_path / "ours", "shardforge", proof="auto", shard_bytes=1 << 16)
        back = converted(ours.path, tmp_path / "back", proof="auto", shard_bytes=1 << 16)
    assert {each.certificate["proof"]["method"] for each in (ours, back)} == {"transformers"}
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
