from __future__ import annotations

import torch

from shardforge.verify.measure import Task, fingerprint, measure, rate
from tests.tiny import assert_same, tiny

COSINE = {"kind": "cosine", "lr": 0.02, "warmup": 1}


def test_two_tensors_that_differ_have_different_prints():
    one = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    other = one.clone()
    other[1, 2], other[2, 1] = one[2, 1], one[1, 2]
    (norm, projection), (same_norm, other_projection) = fingerprint(one), fingerprint(other)
    assert norm == same_norm and abs(projection - other_projection) > 0.1


def test_prints_differ_by_no_more_than_the_tensors():
    one = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = one + 1e-3
    apart = (one - other).norm().item()
    assert all(abs(a - b) <= apart for a, b in zip(fingerprint(one), fingerprint(other), strict=True))


def test_the_learning_rate_is_the_highest_of_the_schedule():
    schedule = {"kind": "wsd", "lr": 0.02, "warmup": 40}
    recipe = tiny(schedule=schedule, train={"steps": 1000, "sequences": 8, "seq_len": 16})
    assert rate(recipe) == 0.02


def test_weights_are_named_in_the_order_of_the_forward_pass(ranks):
    order = ranks(1).run(measure, Task(tiny(), 1))[0].order
    first = [name for name in order if name.startswith("blocks.0.")]
    assert order[0] == "embed.weight" and order[-2:] == ["norm.weight", "head.weight"]
    assert first[0] == "blocks.0.mixer_residual.norm.weight" and first[-1] == "blocks.0.ffn.down.weight"


def test_every_phase_is_measured(ranks):
    found = ranks(1).run(measure, Task(tiny(), 2))[0].values
    assert {phase for phase, _, _ in found} == {"start", "step 1", "step 2", "held out"}
    assert {what for phase, what, _ in found if phase == "step 1"} == {
        *("loss", "scored labels", "gradient", "gradient norm", "weight", "optimizer state")
    }


def test_without_gradients_only_the_last_weights_are_kept(ranks):
    found = ranks(1).run(measure, Task(tiny(), 2, gradients=False))[0].values
    assert {(phase, what) for phase, what, _ in found} == {("step 2", "weight"), ("step 2", "optimizer state")}


def test_going_on_from_a_checkpoint_is_going_on(ranks, tmp_path):
    saved = ranks(1).run(measure, Task(tiny(), 2, save=tmp_path))[0].values
    loaded = ranks(1).run(measure, Task(tiny(), 1, load=tmp_path))[0].values
    later = {key: value for key, value in loaded.items() if key[0] in ("step 3", "held out")}
    assert_same(later, {key: saved[key] for key in later})
    assert len(later) > 40


def test_a_pipeline_rank_answers_for_its_own_stage(ranks):
    from shardforge.core.layout import Layout

    train = {"steps": 2, "sequences": 8, "seq_len": 16, "micro_batch": 2}
    first, last = ranks(2).run(measure, Task(tiny(layout=Layout(pp=2), train=train), 1))
    assert ("step 1", "gradient", "embed.weight") in first.values
    assert ("step 1", "gradient", "head.weight") in last.values
    assert not first.values.keys() & last.values.keys()
