from __future__ import annotations

import json
import math

import pytest

from shardforge.observe import health
from shardforge.observe.experts import ExpertTally
from shardforge.observe.health import Health, level, recall, record, stride, warning


def tally(*load: float, **options) -> ExpertTally:
    return ExpertTally(tuple(map(float, load)), **{"tokens": 10.0, "entropy": 5.0, "dropped": 0.0} | options)


EVEN, BUSY, LOST = tally(4, 4, 4, 4), tally(12, *[2] * 9), tally(8, 8, 0, 0)
TOLD = ("count", "max_vio", "dead", "entropy_share", "drop_rate", "bias", "relative")


@pytest.mark.parametrize(
    ("use", "expected"),
    [(EVEN, "good"), (BUSY, "watch"), (LOST, "bad"), (tally(*[9] * 99, 0), "watch"), (tally(*[61] + [1] * 39), "bad")],
    ids=["even", "three-times-its-share", "many-dead", "one-of-a-hundred-dead", "most-to-one"],
)
def test_a_layer_is_judged_by_its_fullest_and_its_dead_experts(use, expected):
    assert level(use) == expected


def test_the_health_of_a_run_is_that_of_its_worst_layer():
    found = Health.of({2: EVEN, 5: BUSY, 7: LOST})
    assert (found.worst, found.max_vio, found.dead, found.count, found.level) == (5, BUSY.max_vio, 2, 18, "bad")


def test_biases_are_the_bounds_of_all_layers():
    one, two = tally(1, 1, bias=(-0.5, 0.1)), tally(1, 1, bias=(-0.1, 0.7))
    assert Health.of({0: one, 1: EVEN, 2: two}).bias == (-0.5, 0.7)
    assert Health.of({0: EVEN}).bias is None


def test_a_warning_names_the_layer_and_its_dead_experts():
    text = warning({2: EVEN, 5: BUSY, 7: LOST})
    parts = ("collapsing in 2 of 3 layers", "MaxVio 3.00 in layer 5", "2 of 18 without a token", "layer 7: 2 of 4")
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("experts", [{}, {1: EVEN}])
def test_even_layers_and_models_without_experts_give_no_warning(experts):
    assert warning(experts) == ""


def test_a_record_says_again_what_was_told():
    experts = {1: tally(1, 3, dropped=4.0, bias=(-0.25, 0.5)), 4: tally(2, 2, 0, 4)}
    again = recall(json.loads(json.dumps(record(experts, loads=True))))
    for layer, use in experts.items():
        for name in TOLD:
            expected = getattr(use, name)
            assert getattr(again[layer], name) == (pytest.approx(expected, rel=5e-4) if expected else expected)


def test_a_record_without_loads_says_all_the_rest():
    again = recall(record({1: BUSY}, loads=False))[1]
    assert (again.relative, again.dead, again.max_vio) == ((), 0, pytest.approx(BUSY.max_vio, rel=5e-4))


def test_what_no_layer_has_takes_no_room():
    assert set(record({1: EVEN}, loads=False)) == {"layer", "count", "max_vio", "dead", "entropy_share"}


def test_a_number_that_is_not_finite_is_null_and_comes_back_as_nan():
    told = json.dumps(record({1: tally(1, 1, entropy=math.nan)}, loads=False), allow_nan=False)
    assert math.isnan(recall(json.loads(told))[1].entropy_share)


def test_a_large_load_that_is_not_zero_is_never_told_as_zero():
    use = tally(1, *[10**7] * 63)
    assert recall(record({1: use}, loads=True))[1].relative[0] > 0


@pytest.mark.parametrize(("layers", "experts", "expected"), [(2, 8, 1), (12, 64, 3), (58, 256, 58)])
def test_loads_come_less_often_where_there_are_more(layers, experts, expected):
    use = tally(*[1] * experts)
    assert stride(dict.fromkeys(range(layers), use)) == expected
    assert layers * experts / expected <= health.LOADS
