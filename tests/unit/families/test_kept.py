from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.core.errors import Problems
from shardforge.families.kept import kept

WEIGHTS = {"a": (2, 3), "b": (3,), "frozen": (4,)}
ADAM = {"exp_avg": {"a": (2, 3), "b": (3,)}, "exp_avg_sq": {"a": (2, 3), "b": (3,)}, "step": {"a": (), "b": ()}}


def test_what_every_updated_weight_has_is_carried():
    found = kept(WEIGHTS, ADAM)
    assert (found.moments, found.counts) == (("exp_avg", "exp_avg_sq"), ("step",))
    assert (found.torn, found.unread) == ((), ())


@pytest.mark.parametrize(
    ("kind", "of", "told"),
    [
        ("exp_avg_sq", {"a": (2, 3)}, "exp_avg_sq of b is missing"),
        ("step", {"a": ()}, "step of b is missing"),
        ("exp_avg", {"a": (2, 3), "b": (4,)}, "exp_avg of b is [4], the weight [3]"),
        ("exp_avg", {"a": (2, 3), "b": (3,), "gone": (1,)}, "exp_avg of gone is of no weight here"),
    ],
)
def test_a_kind_that_some_weights_lack_is_torn(kind, of, told):
    found = kept(WEIGHTS, ADAM | {kind: of})
    assert told in [each.what for each in found.torn] and kind in (*found.moments, *found.counts)
    with pytest.raises(Problems, match="what the optimizer kept in x"):
        found.check(Path("x"))


def test_a_kind_of_another_shape_than_the_weights_is_told():
    found = kept(WEIGHTS, ADAM | {"rows": {"a": (2,), "b": (1,)}})
    assert found.moments == ("exp_avg", "exp_avg_sq") and found.torn == ()
    assert found.unread == ("rows, which the optimizer kept: it has the shape of no weight",)


def test_weights_without_an_optimizer_lack_nothing():
    kept(WEIGHTS, {}).check(Path("x"))
