from __future__ import annotations

import math

import pytest
import torch

from shardforge.convert.distance import Gauge, gauged

NAN, INF = math.nan, math.inf


def vectors(*rows):
    return torch.tensor([rows], dtype=torch.float64)


def test_what_is_equal_is_not_apart():
    x = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(1))
    gauge = gauged(x, x.clone())
    assert (gauge.max_abs, gauge.cosine, gauge.error()) == (0.0, 1.0, 0.0)


def test_the_error_is_of_the_token_that_is_furthest_apart():
    gauge = gauged(vectors((1.0, 0.0), (0.0, 2.0)), vectors((1.0, 0.0), (0.0, 1.0)))
    assert gauge.error() == 1.0 and gauge.max_abs == 1.0


def test_a_share_of_the_worst_tokens_can_be_left_out():
    want = torch.ones(1, 10, 1)
    got = want.clone()
    got[0, 3] = 5.0
    assert gauged(got, want).error(0.1) == 0.0 and gauged(got, want).error(0.05) == 4.0


def test_the_cosine_is_of_all_tokens_together():
    gauge = gauged(vectors((1.0, 0.0), (0.0, 1.0)), vectors((1.0, 0.0), (1.0, 0.0)))
    assert gauge.cosine == pytest.approx(0.5)


def test_pieces_add_up_to_the_whole():
    chance = torch.Generator().manual_seed(1)
    got, want = torch.randn(2, 1, 4, 9, generator=chance, dtype=torch.float64).unbind()
    pieces = Gauge(4)
    for part in (slice(0, 5), slice(5, 9)):
        pieces.add(got[..., part], want[..., part])
    whole = gauged(got, want)
    assert pieces.error() == pytest.approx(whole.error()) and pieces.cosine == pytest.approx(whole.cosine)
    assert pieces.max_abs == whole.max_abs


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_same_number_that_is_none_is_equal(value):
    gauge = gauged(vectors((value, 1.0)), vectors((value, 1.0)))
    assert (gauge.max_abs, gauge.error()) == (0.0, 0.0)


@pytest.mark.parametrize(("got", "want"), [(NAN, 1.0), (1.0, NAN), (INF, -INF), (INF, NAN)])
def test_a_number_that_is_none_on_one_side_is_infinitely_far(got, want):
    gauge = gauged(vectors((got, 1.0)), vectors((want, 1.0)))
    assert gauge.max_abs == INF and gauge.error() == INF


def test_from_nothing_everything_is_infinitely_far():
    assert gauged(vectors((1.0,)), vectors((0.0,))).error() == INF
