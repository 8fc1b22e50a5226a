"""The proof of a conversion takes every family's models through transformers, layer by layer, without a false alarm."""

from __future__ import annotations

import pytest

from shardforge.convert.independent import obstacle
from shardforge.convert.proof import prove
from shardforge.families.open import open_source
from tests.parity.compare import quiet
from tests.parity.test_families import CASES, their_model


@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees_with_our_forward_in_every_layer(tmp_path, name):
    folder = tmp_path / name
    with quiet():
        their_model(CASES[name]).save_pretrained(folder)
    CASES[name].stored(folder)
    reason = obstacle(open_source(folder))
    proof = prove(folder, folder, how="auto", cast=False, bisect=True)
    assert proof.method == ("own" if reason else "transformers"), reason
    assert not reason or "quantised" in reason
    assert all(layer.error <= each.tolerance for each in proof.comparisons for layer in each.layers)
