from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.core.errors import Problems, RecipeError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.families.open import open_source
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.recipe.provenance import dump
from shardforge.recipe.schema import CheckpointConfig
from shardforge.train import start
from tests.equivalence.cases import whole
from tests.tiny import GQA, tiny

TRAIN = {"steps": 2, "sequences": 8, "seq_len": 16}
LAYOUTS = [Layout(dp_shard=4), Layout(dp_shard=2, tp=2), Layout(pp=2, dp_shard=2), Layout(dp_replicate=2, tp=2)]
ROPE = {"kind": "rope", "base": 500000.0}


def engine(recipe):
    return recipe.engine.build(recipe, torch.device("cpu"))


def begun(path: str, layout: Layout, **changes: Any) -> tuple[dict[str, Tensor], bool]:
    """Whole weights of this rank after a start, and whether the optimizer is as it was built."""
    recipe = tiny(layout=layout, train=TRAIN | {"start": path, "micro_batch": 1}, **changes)
    made = engine(recipe)
    start.begin(open_source(Path(path)), recipe, made)
    states = [tensor for name, tensor in made.state().items() if name.startswith("optim.")]
    fresh = all(not (t.to_local() if isinstance(t, DTensor) else t).any() for t in states)
    return {name: whole(weight) for name, weight in made.model.named_parameters()}, fresh


def saved_by(layout: Layout, root: str) -> None:
    """Of a layout's ranks together: its run directory, with the weights of seed 7 as step 3."""
    recipe = tiny(layout=layout, seed=7)
    made = engine(recipe)
    store = Store(RunDir(Path(root)).checkpoints, CheckpointConfig(), describe=made.describe())
    store.save(3, made.state(), {}, wait=True)
    store.close()


@pytest.fixture
def other(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    """A run directory in float64 of the tiny model with the weights of seed 7, and these."""
    recipe = tiny()
    model = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    fill(model, 7)
    run = RunDir(tmp_path / "other")
    run.path.mkdir()
    run.recipe.write_text(dump(recipe))
    store = Store(run.checkpoints, CheckpointConfig(), describe={"model": table(model)})
    store.save(3, collect(model), {}, wait=True)
    store.close()
    return run.path, {name: weight.detach() for name, weight in model.named_parameters()}


def recipe_of(path: Path | str, **changes: Any):
    return tiny(train=TRAIN | {"start": str(path)}, **changes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout_begins_with_the_whole_weights(ranks, other, layout):
    path, weights = other
    met = set()
    for got, _ in ranks(4).run(begun, str(path), layout):
        met |= got.keys()
        assert all(torch.equal(value, weights[name]) for name, value in got.items())
    assert met == weights.keys()


def test_weights_that_another_layout_saved_are_put_together(ranks, tmp_path, other):
    path, weights = other
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "recipe.yaml").write_text((path / "recipe.yaml").read_text())
    ranks(4).run(saved_by, Layout(dp_shard=2, tp=2), str(shared))
    for got, _ in ranks(2).run(begun, str(shared), Layout(dp_shard=2)):
        assert all(torch.equal(value, weights[name]) for name, value in got.items())


def test_the_optimizer_begins_fresh(ranks, other):
    ((_, fresh),) = ranks(1).run(begun, str(other[0]), Layout())
    assert fresh


def test_a_run_with_a_checkpoint_of_its_own_does_not_begin_again(tmp_path, other):
    run = RunDir(other[0])
    assert start.find(recipe_of(tmp_path / "no longer there"), run) is None


def test_without_the_field_a_run_begins_at_random(tmp_path):
    assert start.find(tiny(), RunDir(tmp_path)) is None


def test_weights_that_are_not_there_are_a_mistake_in_the_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"train.start: there is nothing here"):
        start.find(recipe_of(tmp_path / "gone"), RunDir(tmp_path / "run"))


def test_all_differences_from_the_model_are_told_at_once_with_both_shapes(tmp_path, other):
    recipe = recipe_of(other[0], model={"head": "tied"}, ffn={"kind": "glu", "inner": 40})
    with pytest.raises(Problems) as caught:
        start.find(recipe, RunDir(tmp_path / "run"))
    text = str(caught.value)
    assert "blocks.0.ffn.gate.weight: [24, 16] there, [40, 16] here" in text
    assert "blocks.1.ffn.down.weight: [16, 24] there, [16, 40] here" in text
    assert "head.weight: [32, 16] there, absent here" in text


def test_what_has_the_same_shapes_and_another_meaning_is_told_once(other):
    source = open_source(other[0])
    recipe = recipe_of(other[0], mixer=GQA | {"position": ROPE})
    assert start.meanings(source.model, recipe.model) == ["layers.mixer.position.base: 10000.0 there, 500000.0 here"]


def test_a_model_that_pairs_rotary_channels_otherwise_begins_with_its_rows_turned(tmp_path, other):
    recipe = recipe_of(other[0], mixer=GQA | {"position": {"kind": "rope", "layout": "interleaved"}})
    source = start.find(recipe, RunDir(tmp_path / "run"))
    assert start.meanings(source.model, recipe.model) == []
    assert start.identity(source)["step"] == 3
    rows = source.read("blocks.0.mixer.q.weight").unflatten(0, (4, 2, 2))  # heads, pairs, one and the other of a pair
    assert torch.equal(rows.transpose(1, 2).flatten(0, 2), other[1]["blocks.0.mixer.q.weight"])


def test_the_name_of_a_block_has_no_meaning(other):
    block = {"mixer": GQA, "ffn": {"kind": "glu", "inner": 24}, "residual": {"kind": "pre"}}
    model = {"blocks": {"b": block, "a": block}, "stack": ["a", "b"], "init": {"std": 0.1}, "core": "eager"}
    assert start.meanings(open_source(other[0]).model, recipe_of(other[0], model=model).model) == []


def test_provenance_says_which_checkpoint_it_was(other):
    told = start.identity(open_source(other[0]))
    assert (
        told["path"].endswith("other/checkpoints/step-00000003") and told["step"] == 3 and len(told["manifest"]) == 64
    )
    assert json.loads(json.dumps(told)) == told
