"""A dense run, a mixture made of it with what its optimizer kept, and the first update of a run that begins with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.checkpoint.store import Store
from shardforge.core.errors import CheckpointError, RecipeError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.families.open import open_source
from shardforge.recipe.load import load
from shardforge.recipe.provenance import dump, plain
from shardforge.train import run, start
from shardforge.upcycle.options import read_options
from shardforge.upcycle.run import upcycle
from tests.equivalence.cases import whole
from tests.tiny import batch, tiny

STEPS, LR, DECAY = 3, 0.01, 0.1
OPTIM = {"kind": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": DECAY, "clip": None}
TRAIN = {"steps": 2, "sequences": 8, "seq_len": 16}


def engine(recipe):
    return recipe.engine.build(recipe, torch.device("cpu"))


def trained(root: Path) -> None:
    """The directory of a dense run after some steps of AdamW in float64."""
    recipe = tiny(optim=OPTIM)
    made = engine(recipe)
    for step in range(STEPS):
        made.forward_backward(batch(step), step)
        made.update(LR)
    root.mkdir()
    (root / "recipe.yaml").write_text(dump(recipe))
    store = Store(RunDir(root).checkpoints, recipe.checkpoint, describe=made.describe())
    store.save(STEPS, made.state(), {"data": "corpus"}, wait=True)
    store.close()


@pytest.fixture(scope="module")
def mixture(ranks, tmp_path_factory) -> Path:
    """What `upcycle --moments carry` makes of it."""
    root = tmp_path_factory.mktemp("moments")
    given = read_options(flags={"experts": 4, "moments": "carry"})
    ranks(1).run(trained, root / "dense")
    return upcycle(root / "dense", root / "moe", given, processes=1).path


def recipe_of(path: Path, *, layout: Layout | None = None, **changes: Any):
    sections = {"model": plain(load(path / "recipe.yaml").recipe.model), "optim": OPTIM}
    wanted = {"start": str(path), "start_moments": "carried", "micro_batch": 1}
    return tiny(layout=layout, train=TRAIN | wanted | changes.pop("train", {}), **sections | changes)


def begun(path: str, layout: Layout) -> dict[str, Tensor]:
    recipe = recipe_of(Path(path), layout=layout)
    made = engine(recipe)
    start.begin(open_source(Path(path)), recipe, made)
    return {name: whole(tensor) for name, tensor in made.state().items()}


def updated(path: Path, moments: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights before the first update, their gradients, and the weights after it."""
    recipe = recipe_of(path, train={"start_moments": moments})
    made = engine(recipe)
    source = start.find(recipe, RunDir(path / "run"))
    assert source is not None
    start.begin(source, recipe, made)
    made.forward_backward(batch(0), 0)
    weights = dict(made.model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    slopes = {name: weight.grad.clone() for name, weight in weights.items()}
    made.update(LR)
    return before, slopes, {name: weight.detach() for name, weight in weights.items()}


def foreign(path: Path) -> tuple[str, list[str]]:
    """What a start with the moments of another optimizer says, and the tensors that it has changed."""
    recipe, source = recipe_of(path), open_source(path)
    made = engine(recipe)
    source.moments = ("momentum",)
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    try:
        start.begin(source, recipe, made)
    except CheckpointError as error:
        return str(error), [name for name, tensor in made.state().items() if not torch.equal(tensor, before[name])]
    return "", []


def adam(weight: Tensor, slope: Tensor, first: Tensor, second: Tensor, step: int, decayed: bool) -> Tensor:
    """Update number `step` by hand: arXiv:1711.05101, algorithm 2."""
    first, second = 0.9 * first + 0.1 * slope, 0.95 * second + 0.05 * slope.square()
    bent = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    return weight * (1 - LR * DECAY * decayed) - LR * bent


@pytest.mark.parametrize("name, count", [
    ("blocks.0.ffn.experts.gate", STEPS), ("blocks.1.ffn.experts.down", STEPS), ("blocks.0.mixer.q.weight", STEPS),
    ("blocks.1.ffn.router.weight", 0),
])  # fmt: skip
def test_the_first_update_goes_on_from_carried_moments_and_counts(ranks, mixture, name, count):
    ((before, slopes, after),) = ranks(1).run(updated, mixture, "carried")
    kept = open_source(mixture)
    first, second = (kept.read_moment(kind, name) for kind in ("exp_avg", "exp_avg_sq"))
    assert kept.read_moment("step", name).item() == count and bool(first.any()) == bool(count)
    expected = adam(before[name], slopes[name], first, second, count + 1, decayed=True)
    torch.testing.assert_close(after[name], expected, rtol=1e-10, atol=1e-14)


def test_dropped_moments_are_as_if_there_were_none(ranks, mixture):
    ((before, slopes, after),) = ranks(1).run(updated, mixture, "dropped")
    name = "blocks.0.ffn.experts.gate"
    none = torch.zeros_like(before[name])
    torch.testing.assert_close(
        after[name], adam(before[name], slopes[name], none, none, 1, decayed=True), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("layout", [Layout(dp_shard=2, tp=2), Layout(pp=2, dp_shard=2)], ids=str)
def test_any_layout_begins_with_the_whole_moments(ranks, mixture, layout):
    (expected,), met = ranks(1).run(begun, str(mixture), Layout()), set()
    for got in ranks(4).run(begun, str(mixture), layout):
        met |= got.keys()
        assert all(torch.equal(value, expected[name]) for name, value in got.items())
    assert met == expected.keys() and any(name.endswith(".exp_avg") for name in met)


def test_the_recipe_beside_the_weights_asks_for_them(mixture):
    assert load(mixture / "recipe.yaml").recipe.train.start_moments == "carried"


def test_a_source_without_them_is_refused(mixture, tmp_path):
    bare = upcycle(mixture.parent / "dense", tmp_path / "bare", read_options(flags={"experts": 4}), processes=1).path
    assert load(bare / "recipe.yaml").recipe.train.start_moments == "dropped"
    with pytest.raises(RecipeError, match="no optimizer state") as found:
        start.find(recipe_of(bare), RunDir(tmp_path / "run"))
    assert "train.start_moments: dropped" in found.value.fix


def test_those_of_another_optimizer_are_refused_before_anything_is_filled(ranks, mixture):
    ((told, changed),) = ranks(1).run(foreign, mixture)
    assert "kept momentum, step there, this one keeps exp_avg, exp_avg_sq, step" in told and not changed


def test_carrying_from_nowhere_is_a_mistake(tmp_path):
    with pytest.raises(RecipeError, match="nothing to carry"):
        start.find(tiny(train=TRAIN | {"start_moments": "carried"}), RunDir(tmp_path))


def test_a_folder_of_an_upcycling_is_no_run_to_go_on_with(mixture):
    with pytest.raises(RecipeError, match="no run to go on with") as found:
        run.check_same_run(RunDir(mixture), recipe_of(mixture))
    assert "--set run_dir=" in found.value.fix
