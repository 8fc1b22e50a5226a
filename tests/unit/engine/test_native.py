from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.errors import ForgeError
from shardforge.core.layout import Layout
from shardforge.engine.native import NativeEngine
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.nn.batch import IGNORE, Batch
from tests.equivalence.cases import whole
from tests.tiny import LENGTH, batch, part, tiny

DROPPED = {"residual": {"kind": "pre", "dropout": 0.5}}
BF16 = {"precision": {"master": "fp32", "compute": "bf16", "reduce": "fp32"}}


def engine(layout: Layout | None = None, **changes: Any) -> NativeEngine:
    recipe = tiny(layout=layout or Layout(), **changes)
    return recipe.engine.build(recipe, torch.device("cpu"))


def weights(made: NativeEngine) -> dict[str, Tensor]:
    return {name: whole(weight) for name, weight in made.model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def silent(given: Batch) -> Batch:
    """A batch in which nothing is scored."""
    return Batch(given.tokens, torch.full_like(given.labels, IGNORE), given.positions, given.documents, given.rows)


def cleared() -> bool:
    made = engine()
    made.forward_backward(batch(), 0)
    had = all(weight.grad is not None for weight in made.model.parameters())
    made.update(0.1)
    return had and all(weight.grad is None for weight in made.model.parameters())


def evaluated() -> tuple[bool, bool, bool]:
    """Equal twice; equal without any dropout at all; no gradients left behind."""
    made, plain = engine(**DROPPED), engine()
    first, second = made.evaluate(batch()).loss, made.evaluate(batch()).loss
    idle = all(weight.grad is None for weight in made.model.parameters())
    return first == second, first == plain.evaluate(batch()).loss, idle


def dropped() -> list[float]:
    made = engine(**DROPPED)
    return [made.forward_backward(batch(), step).loss for step in (0, 0, 1)]


def nothing_scored() -> tuple[float, int, float]:
    made = engine()
    losses = made.forward_backward(silent(batch()), 0)
    return losses.loss, losses.scored, made.update(0.1).grad_norm


def counted() -> tuple[int, int]:
    return engine().forward_backward(batch(), 0).scored, int((batch().labels != IGNORE).sum())


def terms() -> tuple[bool, set[str]]:
    """The reported loss is that without the term, and the term has its own name."""
    plain = engine().forward_backward(batch(), 0)
    with_z = engine(objective={"kind": "next_token", "z_loss": 0.5}).forward_backward(batch(), 0)
    return plain.loss == with_z.loss, set(with_z.terms)


def moved(rate: float, clip: float | None) -> float:
    """How far the weights go in one step without decay: Adam moves each by the rate, or not at all."""
    made = engine(optim={"kind": "adamw", "weight_decay": 0.0, "clip": clip, "eps": 1e-30})
    before = weights(made)
    made.forward_backward(batch(), 0)
    made.update(rate)
    return max((weights(made)[name] - before[name]).abs().max().item() for name in before)


def clipped_norm() -> tuple[float, float]:
    """What is reported, and the norm after clipping, read from Adam's first moment."""
    made = engine(optim={"kind": "adamw", "beta1": 0.0, "clip": 0.01})
    made.forward_backward(batch(), 0)
    told = made.update(0.1).grad_norm
    moments = [value.norm() for name, value in made.state().items() if name.endswith(".exp_avg")]
    return told, torch.stack(moments).norm().item()


def resumed(layout: Layout) -> bool:
    """Two steps, then the state into an engine of another seed: the third step is the same."""
    first, second = engine(layout), engine(layout, seed=2)
    mine = [part(batch(step), first.mesh.data_rank, layout.data_ranks) for step in range(3)]
    for step in range(2):
        first.forward_backward(mine[step], step)
        first.update(0.01)
    kept = {name: value.clone() for name, value in first.state().items()}

    def read(tensors: dict[str, Tensor]) -> None:
        assert tensors.keys() == kept.keys()
        for name, value in tensors.items():
            value.copy_(kept[name])

    second.load(read)
    for made in (first, second):
        made.forward_backward(mine[2], 2)
        made.update(0.01)
    return equal(weights(first), weights(second))


def described() -> tuple[bool, bool, bool]:
    made = engine()
    names = set(made.describe()["model"]) == {name for name, _ in made.model.named_parameters()}
    flop = made.step_flops == flops.step_flops(made.model, LENGTH)
    return names, made.weights == sum(weight.numel() for weight in made.model.parameters()), flop


def mixed_types(layout: Layout) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    """Types of the weights at rest, of what a block gets, and of the gradients."""
    made, seen = engine(layout, **BF16), set()
    made.model.blocks["0"].register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    made.forward_backward(part(batch(), made.mesh.data_rank, layout.data_ranks), 0)
    rest = {weight.dtype for weight in made.model.parameters()}
    return rest, seen, {weight.grad.dtype for weight in made.model.parameters()}


def table_types(layout: Layout) -> set[torch.dtype]:
    """Types of the position tables that the layers read."""
    made, seen = engine(layout, **BF16), set()
    for block in made.model.blocks.values():
        block.mixer.position.register_forward_pre_hook(
            lambda module, args: seen.update(table.dtype for table in args[1].tables[module.name])
        )
    made.forward_backward(part(batch(), made.mesh.data_rank, layout.data_ranks), 0)
    return seen


def mistake(layout: Layout, changes: dict[str, Any]) -> str:
    try:
        engine(layout, **changes).forward_backward(batch(), 0)
    except ForgeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_an_update_clears_the_gradients(ranks):
    assert ranks(1).run(cleared) == [True]


def test_an_evaluation_drops_nothing_and_leaves_no_gradient(ranks):
    assert ranks(1).run(evaluated) == [(True, True, True)]


def test_dropout_is_a_function_of_the_step(ranks):
    (first, again, next_step) = ranks(1).run(dropped)[0]
    assert first == again != next_step


def test_a_batch_without_labels_has_loss_0_and_no_gradient(ranks):
    assert ranks(1).run(nothing_scored) == [(0.0, 0, 0.0)]


def test_scored_tokens_are_those_with_a_label(ranks):
    (told, expected) = ranks(1).run(counted)[0]
    assert told == expected


def test_terms_of_the_objective_are_reported_beside_the_loss(ranks):
    assert ranks(1).run(terms) == [(True, {"z_loss"})]


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1])
def test_the_learning_rate_is_that_of_the_call(ranks, rate):
    assert ranks(1).run(moved, rate, None)[0] == pytest.approx(rate, rel=1e-9)


def test_the_norm_is_told_as_it_was_before_clipping(ranks):
    told, clipped = ranks(1).run(clipped_norm)[0]
    assert told > 0.1 and clipped == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "rep2-tp2"])
def test_a_loaded_engine_goes_on_as_the_one_that_was_saved(ranks, layout):
    wanted = Layout.parse(layout)
    assert ranks(wanted.world_size).run(resumed, wanted) == [True] * wanted.world_size


def test_an_engine_knows_the_names_the_size_and_the_cost_of_its_model(ranks):
    assert ranks(1).run(described) == [(True, True, True)]


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2"])
def test_weights_and_gradients_rest_in_float32_and_blocks_compute_in_bfloat16(ranks, layout):
    wanted = Layout.parse(layout)
    for answer in ranks(wanted.world_size).run(mixed_types, wanted):
        assert answer == ({torch.float32}, {torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2"])
def test_position_tables_stay_float32_where_blocks_compute_in_bfloat16(ranks, layout):
    wanted = Layout.parse(layout)
    assert ranks(wanted.world_size).run(table_types, wanted) == [{torch.float32}] * wanted.world_size


def test_a_layout_for_another_number_of_processes_is_refused(ranks):
    for message in ranks(2).run(mistake, Layout(dp_shard=4), {}):
        assert "LayoutError" in message and "needs 4 ranks, this job has 2" in message


def test_a_core_that_cannot_train_here_says_which_can(ranks):
    (message,) = ranks(1).run(mistake, Layout(), {"model": {"core": "flex"}})
    assert "EngineError" in message and "auto, sdpa or eager" in message


@pytest.mark.parametrize(
    ("engine_options", "layout", "told"),
    [
        ({"schedule": "gpipe"}, Layout(), ["engine.schedule: gpipe changes nothing with pp=1"]),
        ({"overlap": True}, Layout(tp=2), []),
        ({}, Layout(dp_shard=2, ep=2), ["parallel.ep=2 changes nothing: the model has no experts"]),
    ],
)
def test_what_nothing_uses_is_said(engine_options: dict[str, Any], layout: Layout, told: list[str]):
    recipe = tiny(layout=layout, engine={"kind": "native", **engine_options})
    assert list(recipe.engine.idle(layout, build(recipe.model, recipe.objective.build()))) == told
