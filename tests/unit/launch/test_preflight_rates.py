from __future__ import annotations

import random

import pytest

from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_rates import ROUNDS, Rate, next_pairs, slow, slow_inside

FLOOR = PreflightConfig(pair_gb_s=20.0, share=0.0)
SHARE = PreflightConfig(share=0.5)
FAST, SICK = 48.0, 3.0


def measured(nodes: list[str], sick: set[str], config: PreflightConfig, dead: frozenset[str] = frozenset()):
    """All rates and the rounds of them, where a pair is as fast as its slower node."""
    rates: list[Rate] = []
    rounds = []
    for _ in range(ROUNDS):
        pairs = next_pairs(nodes, rates, config)
        if not pairs:
            break
        rounds.append(pairs)
        for pair in pairs:
            hung = dead & {*pair}
            rates.append(Rate(pair, 0.0 if hung else SICK if sick & {*pair} else FAST, "timeout" if hung else ""))
    return rates, rounds


def names(size: int) -> list[str]:
    return [f"n{number}" for number in range(size)]


@pytest.mark.parametrize("size", [2, 4, 5, 63, 64])
def test_good_nodes_are_all_good_in_at_most_two_rounds(size):
    rates, rounds = measured(names(size), set(), SHARE)
    assert not slow(names(size), rates, SHARE) and len(rounds) == 1 + size % 2


@pytest.mark.parametrize("config", [FLOOR, SHARE], ids=["floor", "share"])
@pytest.mark.parametrize("size", [3, 4, 5, 8, 63, 64])
def test_the_slow_node_is_named_and_never_its_partner(size, config):
    for sick in names(size):
        rates, _ = measured(names(size), {sick}, config)
        assert list(slow(names(size), rates, config)) == [sick], sick


@pytest.mark.parametrize("seed", range(20))
def test_several_slow_nodes_are_all_named_and_only_they(seed):
    draw = random.Random(seed)
    sick = set(draw.sample(names(64), draw.randint(2, 16)))
    rates, _ = measured(names(64), sick, FLOOR)
    assert set(slow(names(64), rates, FLOOR)) == sick


def test_a_node_that_hangs_is_named_by_what_its_partners_saw():
    rates, _ = measured(names(8), set(), SHARE, frozenset({"n5"}))
    found = slow(names(8), rates, SHARE)
    assert list(found) == ["n5"] and found["n5"].count("timeout") == 2


def test_a_node_that_met_the_slow_one_is_slow_only_after_two_fast_ones_found_it_so():
    rates = [Rate(("n0", "n2"), SICK), Rate(("n1", "n3"), FAST), Rate(("n0", "n1"), SICK), Rate(("n2", "n3"), SICK)]
    assert next_pairs(names(4), rates, FLOOR) == [("n0", "n3"), ("n2", "n1")]
    rates += [Rate(("n0", "n3"), FAST), Rate(("n2", "n1"), SICK)]
    assert list(slow(names(4), rates, FLOOR)) == ["n2"]


def test_pairs_of_a_round_are_disjoint():
    for seed in range(20):
        draw = random.Random(seed)
        _, rounds = measured(names(33), set(draw.sample(names(33), 6)), FLOOR)
        assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)


def test_the_first_round_pairs_distant_nodes():
    assert next_pairs(names(6), [], SHARE) == [("n0", "n3"), ("n1", "n4"), ("n2", "n5")]


def test_of_two_nodes_below_the_floor_neither_is_cleared():
    rates, _ = measured(names(2), {"n1"}, FLOOR)
    assert set(slow(names(2), rates, FLOOR)) == {"n0", "n1"}


def test_when_no_node_is_fast_the_floor_is_too_high_for_all():
    rates, _ = measured(names(6), {*names(6)}, FLOOR)
    assert set(slow(names(6), rates, FLOOR)) == {*names(6)}


def test_the_reason_tells_whom_it_met_at_what_speed_and_what_is_asked():
    rates, _ = measured(names(4), {"n3"}, FLOOR)
    assert slow(names(4), rates, FLOOR)["n3"] == "with n1: 3 GB/s; with n2: 3 GB/s; the floor is 20 GB/s"


def test_inside_a_node_it_stands_for_itself():
    rates = [Rate(("a",), 300.0), Rate(("b",), 310.0), Rate(("c",), 90.0), Rate(("d",), 0.0, "GPU 2: timeout")]
    assert list(slow_inside(rates, SHARE)) == ["c", "d"]
