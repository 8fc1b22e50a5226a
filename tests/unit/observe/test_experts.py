from __future__ import annotations

import math

import pytest

from shardforge.observe.experts import ExpertTally


def tally(*load: float, tokens: float = 8.0, entropy: float = 0.0, dropped: float = 0.0) -> ExpertTally:
    return ExpertTally(tuple(load), tokens, entropy, dropped)


@pytest.mark.parametrize(("load", "expected"), [((4, 4, 4, 4), 0.0), ((16, 0, 0, 0), 3.0), ((6, 2, 4, 4), 0.5)])
def test_the_violation_is_how_far_the_fullest_expert_is_above_the_mean(load, expected):
    assert tally(*map(float, load)).max_vio == expected


def test_an_expert_without_a_token_is_dead():
    assert tally(3.0, 0.0, 5.0, 0.0).dead == 2


def test_shares_are_of_all_assignments():
    made = tally(1.0, 3.0, 4.0)
    assert (made.min_share, made.max_share) == (0.125, 0.5)


def test_a_router_that_knows_nothing_has_the_whole_entropy():
    made = tally(4.0, 4.0, 4.0, 4.0, tokens=8.0, entropy=8 * math.log(4))
    assert made.mean_entropy == pytest.approx(math.log(4), rel=1e-15)
    assert made.entropy_share == pytest.approx(1.0, rel=1e-15)


def test_what_found_no_room_is_a_share_of_what_was_wanted():
    assert tally(5.0, 3.0, dropped=2.0).drop_rate == 0.25


def test_one_expert_has_no_entropy_to_have_a_share_of():
    assert tally(8.0, entropy=0.0).entropy_share == 0.0


def test_a_step_of_padding_alone_has_no_violation_and_no_share():
    made = tally(0.0, 0.0, tokens=0.0)
    assert (made.max_vio, made.min_share, made.max_share, made.mean_entropy, made.drop_rate) == (0.0,) * 5
    assert made.dead == 2
