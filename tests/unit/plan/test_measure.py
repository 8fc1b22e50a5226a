from __future__ import annotations

import pytest

from shardforge.core.errors import EngineError
from shardforge.plan import measure
from shardforge.plan.measure import Measured
from shardforge.plan.simulate import Cost
from tests.tiny import GLU, GQA, tiny
from tests.unit.plan.conftest import even

TWO = {
    "blocks": {
        "one": {"mixer": GQA, "ffn": GLU},
        "wide": {"mixer": GQA, "ffn": GLU | {"inner": 96}},
    },
    "stack": ["one", "wide", "one"],
}


def test_every_kind_of_block_and_both_ends_are_timed():
    told: list[str] = []
    found = measure.measure(tiny(model=TWO), told.append)
    assert told[0].startswith("timing 4 parts on ") and "16 of 16 tokens" in told[0]
    assert [line.split()[0] for line in told[1:]] == ["one", "wide", "embedding", "head"]
    assert found.blocks[0] == found.blocks[2] != found.blocks[1]
    assert all(cost.forward > 0 and cost.input_grad > 0 for cost in (*found.blocks, found.last))
    assert found.first.input_grad == 0  # tokens have no gradient


def test_a_tied_head_is_timed_with_a_table_of_its_own():
    found = measure.measure(tiny(model={"head": "tied"}), lambda line: None)
    assert found.last.forward > 0 and found.last.weight_grad >= 0


def test_the_slowest_stage_gets_the_fewest_layers():
    found = Measured(16, Cost() * 0, (Cost() * 3, Cost(), Cost(), Cost()), Cost() * 0)
    assert found.balanced(2) == (1, 3)


def test_a_mean_rank_takes_three_for_a_micro_batch():
    found = Measured(16, Cost() * 0, (Cost() * 5, Cost() * 7), Cost() * 2)
    costs = found.of(even("1f1b", 2))
    assert sum(cost.total for cost in costs) == pytest.approx(2 * 3)
    assert costs[1].total / costs[0].total == pytest.approx(9 / 5)


def test_a_long_sequence_is_timed_in_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(measure.FLOP, "cpu", 1e5)
    told: list[str] = []
    measure.measure(tiny(train={"steps": 1, "sequences": 1, "seq_len": 256}), told.append)
    assert "32 of 256 tokens" in told[0]


def test_parts_too_large_for_this_machine_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(measure.WEIGHTS, "cpu", 2500)
    with pytest.raises(EngineError, match=r"a part may have 2\.50K: wide \(5\.\d+K\)\n    fix: leave it out"):
        measure.measure(tiny(model=TWO), print)
