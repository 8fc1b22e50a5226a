from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardforge.core.errors import LayoutError, Problems, RecipeError
from shardforge.recipe.load import from_mapping
from shardforge.recipe.rules import RULES, check, divisors_near, nearest, place
from shardforge.recipe.tree import Origin
from tests.unit.recipe.stock import TEXT

DENSE = {"mixer": {"kind": "gqa", "heads": 4}, "ffn": {"kind": "glu", "inner": 32}}
NOPE = {**DENSE, "mixer": {"kind": "gqa", "heads": 4, "position": "nope"}}
RAMP = {"start": 4, "increment": 2, "steps": 4}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The smallest recipe with each `section__field` of `changes` put in."""
    mapping = {"name": "x", **yaml.safe_load(TEXT)}
    for name, value in changes.items():
        section, field = name.split("__")
        mapping[section] = {**mapping.get(section, {}), field: value}
    return mapping


def broken(**changes: Any) -> list[str]:
    """What the rules say of it."""
    try:
        from_mapping(changed(changes))
    except Problems as found:
        return [f"{problem.what} | {problem.fix}" for problem in found.problems]
    return []


@dataclass(frozen=True)
class Pooling:
    sequences: int


def pooled(rows: int, **changes: Any) -> list[str]:
    """What the rules say where the ffn works on pools of so many rows."""
    recipe = from_mapping(changed(changes)).recipe
    blocks = {name: replace(block, ffn=Pooling(rows)) for name, block in recipe.model.blocks.items()}
    recipe = replace(recipe, model=replace(recipe.model, blocks=blocks))
    return [f"{problem.what} | {problem.fix}" for problem in check(recipe, {})]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            3,
            {"train__micro_batch": 4},
            "model.blocks.dense.ffn.sequences: pools of 3 sequences do not fill micro-batches of train.micro_batch=4 | "
            "a pool must divide it: 2 and 4 are the nearest that work",
        ),
        (
            3,
            {"parallel__dp_shard": 2},
            "model.blocks.dense.ffn.sequences: pools of 3 sequences do not fill the share of each of 2 data ranks of "
            "train.sequences=8 | train.sequences: 6 and 12 are the nearest that work",
        ),
        (
            4,
            {"train__batch_warmup": RAMP},
            "model.blocks.dense.ffn.sequences: pools of 4 sequences do not fill the share of each of 1 data ranks of "
            "train.batch_warmup.increment=2 | train.batch_warmup.increment: 4 is the smallest that works",
        ),
    ],
)
def test_a_pool_of_sequences_lies_in_one_micro_batch(rows, changes, message):
    assert pooled(rows, **changes) == [message]


@pytest.mark.parametrize("changes", [{}, {"train__micro_batch": 4}, {"parallel__dp_shard": 2}])
def test_pools_that_fill_micro_batches_break_no_rule(changes):
    assert pooled(2, **changes) == []


def test_the_smallest_recipe_breaks_no_rule():
    assert broken() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__stack": ["dense", "dens x 2"]}, "model.stack: no block is called 'dens' | did you mean 'dense'?"),
        (
            {"model__stack": ["dense", "dense x two"]},
            "model.stack: cannot read 'dense x two' | write a block name, 'name x 12' or '(one another) x 12'",
        ),
        ({"model__stack": []}, "model.stack: a model needs at least one layer | write [dense x 12]"),
        (
            {"model__blocks": {"dense": DENSE, "moe": DENSE}},
            "model.blocks.moe: this block is not in model.stack | "
            "add it to the stack, or write moe: null to leave it out",
        ),
        (
            {"parallel__dp_shard": 3},
            "train.sequences: 8 sequences cannot be shared evenly by 3 data ranks (dp_replicate 1 x dp_shard 3) | "
            "6 and 9 are the nearest that work",
        ),
        (
            {"parallel__dp_replicate": 16},
            "train.sequences: 8 sequences cannot be shared evenly by 16 data ranks (dp_replicate 16 x dp_shard 1) | "
            "16 is the smallest that works",
        ),
        (
            {"train__micro_batch": 3},
            "train.micro_batch: a data rank's share of 8 sequences (8 over 1 ranks) cannot be cut into 3s | "
            "2 and 4 are the nearest that work",
        ),
        (
            {"train__micro_batch": 16},
            "train.micro_batch: a data rank's share of 8 sequences (8 over 1 ranks) cannot be cut into 16s | "
            "8 is the largest that works",
        ),
        (
            {"train__batch_warmup": RAMP | {"start": 2, "increment": 4}},
            "train.batch_warmup.increment: steps of 4 from 2 never meet 8 sequences | "
            "increment must divide 6: 3 and 6 are the nearest that work",
        ),
        (
            {"train__batch_warmup": RAMP | {"start": 10}},
            "train.batch_warmup.start: 10 sequences at the start are more than the full batch of 8 | write at most 8",
        ),
        (
            {"train__batch_warmup": RAMP | {"steps": 11}},
            "train.batch_warmup.steps: 11 steps of batch warm-up are longer than the run of 10 | write at most 10",
        ),
        (
            {"train__seq_len": 33, "parallel__tp": 2},
            "train.seq_len: 33 tokens cannot be split 2 ways over tp | 32 and 34 are the nearest that work",
        ),
        (
            {"train__seq_len": 34, "parallel__cp": 2},
            "train.seq_len: 34 tokens cannot be cut into 2 x 2 chunks over cp | 32 and 36 are the nearest that work",
        ),
        (
            {"train__seq_len": 36, "parallel__cp": 2, "parallel__tp": 4},
            "train.seq_len: 36 tokens cannot be cut into 2 x 2 chunks over cp, with the two chunks of each rank split "
            "4 ways over tp | 32 and 40 are the nearest that work",
        ),
        (
            {"model__vocab": 65, "parallel__tp": 2},
            "model.vocab: 65 rows cannot be split 2 ways over tp | "
            "vocab=66 works; rows beyond the tokenizer are never a target",
        ),
        (
            {"data__build": {"inputs": ["x"], "output": "y", "tokenizer": {"vocab": 300}}},
            "model.vocab: 64 rows are fewer than the 300 tokens of data.build.tokenizer | write at least 300",
        ),
        ({"data__sources": []}, "data.sources: there is no corpus | write [{path: FOLDER}]"),
        (
            {"data__sources": [{"path": "x", "weight": 1, "epochs": 2}]},
            "data.sources.0: weight=1.0 and epochs=2.0 both say how often this source comes | keep one of them",
        ),
        (
            {"data__sources": [{"path": "x", "weight": 1}, {"path": "y", "epochs": 2}, {"path": "z"}]},
            "data.sources: sources must all have a weight, all have epochs, or all have neither; "
            "here 0: weight=1.0, 1: epochs=2.0, 2: neither | give every source a weight",
        ),
        (
            {"precision__compute": "fp64", "precision__reduce": "fp64"},
            "precision.master: fp32 weights cannot feed fp64 compute | write master: fp64",
        ),
        (
            {"precision__compute": "fp32", "precision__reduce": "bf16"},
            "precision.reduce: gradients of fp32 would be summed in bf16 | write reduce: fp32",
        ),
        (
            {"checkpoint__every": 100, "checkpoint__keep_every": 250},
            "checkpoint.keep_every: checkpoints come every 100 steps, so not every 250 | "
            "200 and 300 are the nearest that work",
        ),
        (
            {"schedule__warmup": 11},
            "schedule.warmup: 11 steps of warm-up are longer than the run of 10 | write at most 10",
        ),
        (
            {"model__blocks": {"dense": NOPE}, "parallel__tp": 2, "parallel__dp_shard": 2},
            "model.blocks.dense.mixer.position: nope does not work over tp=2 | "
            "tp=1 keeps the same 4 ranks with dp_shard=4 (dp4)",
        ),
    ],
)
def test_a_broken_rule_names_both_numbers_and_what_works(changes: dict[str, Any], message: str):
    assert broken(**changes) == [message]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__dp_shard": 2, "train__micro_batch": 2},
        {"train__batch_warmup": RAMP, "train__micro_batch": 2},
        {"train__batch_warmup": RAMP | {"start": 8}},
        {"train__batch_warmup": RAMP | {"start": 3, "increment": 5}},
        {"parallel__tp": 2},
        {"data__sources": [{"path": "x", "epochs": 1}, {"path": "y", "epochs": 2}]},
        {"data__sources": [{"path": "x"}, {"path": "y"}]},
        {"precision__compute": "fp64", "precision__reduce": "fp64", "precision__master": "fp64"},
        {"checkpoint__every": 0, "checkpoint__keep_every": 250},
        {"checkpoint__every": 100, "checkpoint__keep_every": 300},
        {"schedule__warmup": 10},
        {"model__blocks": {"dense": NOPE}, "parallel__dp_shard": 2},
        {"data__build": {"inputs": ["x"], "output": "y", "tokenizer": {"path": "t.json"}}},
        {"model__blocks": {"dense": DENSE, "moe": None}},
    ],
)
def test_what_fits_is_let_through(changes: dict[str, Any]):
    assert broken(**changes) == []


def test_warmup_batches_are_shared_by_ranks_and_micro_batches_alike():
    ramp = RAMP | {"start": 6, "increment": 2}
    assert broken(train__batch_warmup=ramp, train__micro_batch=2, parallel__dp_shard=2) == [
        "train.batch_warmup.start: 6 is not a multiple of 4 (2 data ranks x micro_batch 2) | "
        "4 and 8 are the nearest that work",
        "train.batch_warmup.increment: 2 is not a multiple of 4 (2 data ranks x micro_batch 2) | "
        "4 is the smallest that works",
    ]


def test_all_broken_rules_are_reported_at_once():
    assert len(broken(train__sequences=9, parallel__dp_shard=2, schedule__warmup=11, data__sources=[])) == 3


@pytest.mark.parametrize(
    ("changes", "kind"), [({"parallel__dp_shard": 3}, LayoutError), ({"schedule__warmup": 11}, RecipeError)]
)
def test_what_depends_on_the_layout_is_a_layout_error(changes: dict[str, Any], kind: type[Exception]):
    with pytest.raises(Problems) as caught:
        from_mapping(changed(changes))
    assert [type(problem) for problem in caught.value.problems] == [kind]


def test_rules_find_nothing_in_a_recipe_that_loaded():
    loaded = from_mapping(changed({}))
    assert check(loaded.recipe, loaded.origins) == []


def test_a_default_that_clashes_points_to_the_value_it_clashes_with():
    with pytest.raises(Problems, match=r"--set precision\.compute=fp64  precision\.master: fp32 weights"):
        from_mapping(changed({}), ["precision.compute=fp64"])


def test_each_rule_is_asked_once():
    assert len(set(RULES)) == len(RULES)


@pytest.mark.parametrize(
    ("path", "line"), [("a.b", 1), ("a", 1), ("a.b.c", 1), ("d", 2), ("d.e.f.g", 2), ("nowhere", None)]
)
def test_a_field_without_origin_takes_the_nearest(path: str, line: int | None):
    origins = {"a.b": Origin("x", 1, 1), "d.e": Origin("x", 2, 1)}
    found = place(origins, path)
    assert (found.line if isinstance(found, Origin) else None) == line


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_nearest_numbers_are_multiples(value: int, step: int):
    numbers = [int(word) for word in nearest(value, step).split() if word.isdecimal()]
    assert all(number % step == 0 and abs(number - value) < step for number in numbers)


@given(st.integers(1, 500), st.integers(1, 500))
def test_nearest_divisors_divide(value: int, whole: int):
    numbers = [int(word) for word in divisors_near(value, whole).split() if word.isdecimal()]
    assert numbers and all(whole % number == 0 for number in numbers)
