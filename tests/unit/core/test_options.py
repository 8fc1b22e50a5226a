from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from shardforge.core.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class Sizes:
    width: int = option(REQUIRED, "how wide", unit="tokens", at_least=1)
    names: list[str] = option([], "the names")


def test_required_field_has_no_default():
    assert dataclasses.fields(Sizes)[0].default is dataclasses.MISSING


def test_field_carries_its_meaning_unit_and_given_limits_only():
    assert dict(dataclasses.fields(Sizes)[0].metadata) == {"meaning": "how wide", "unit": "tokens", "at_least": 1}


def test_instances_do_not_share_a_default_list():
    assert Sizes(width=1).names is not Sizes(width=1).names
