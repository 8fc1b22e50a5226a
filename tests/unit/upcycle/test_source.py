from __future__ import annotations

from shardforge.families.open import open_source
from shardforge.upcycle.source import mismatches


def test_a_source_matches_itself(source):
    assert list(mismatches(open_source(source), "here")) == []
