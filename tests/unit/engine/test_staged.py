from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.checkpoint.store import Store
from shardforge.core.errors import ForgeError, LayoutError, Problems
from shardforge.core.layout import Layout
from shardforge.engine import staged
from shardforge.engine.fit import check_recipe
from shardforge.engine.native import NativeEngine
from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.recipe.schema import CheckpointConfig
from tests.equivalence.cases import together, whole
from tests.tiny import GLU, GQA, LENGTH, SEQUENCES, batch, part, tiny

TRAIN = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH, "micro_batch": 1}


def recipe(layout: Layout, head: str = "linear", train: dict[str, Any] | None = None, **engine: Any):
    """Four layers; one sequence a micro-batch."""
    given = {"kind": "native", "zero": 2} | engine
    model = {"stack": ["one x 4"], "head": head}
    return tiny(layout=layout, model=model, engine=given, train=TRAIN | (train or {}))


def engine(layout: Layout, seed: int = 1, **changes: Any) -> NativeEngine:
    wanted = recipe(layout, **changes)
    made = type(wanted)(**{**vars(wanted), "seed": seed})
    return made.engine.build(made, torch.device("cpu"))


def model(layout: Layout, **changes: Any) -> Decoder:
    wanted = recipe(layout, **changes)
    return build(wanted.model, wanted.objective.build())


def stepped(made: NativeEngine, step: int) -> None:
    made.forward_backward(part(batch(step), made.mesh.data_rank, made.recipe.parallel.data_ranks), step)
    made.update(0.01)


def store(path: Path, made: NativeEngine) -> Store:
    return Store(path, CheckpointConfig(), describe=made.describe())


def saved(path: Path, layout: Layout, schedule: str, head: str) -> dict[str, Tensor]:
    """Two steps and a save; all of the state, on rank 0."""
    made = engine(layout, schedule=schedule, head=head)
    for step in range(2):
        stepped(made, step)
    keeper = store(path, made)
    keeper.save(2, made.state(), {}, wait=True)
    keeper.close()
    return together({name: whole(tensor) for name, tensor in made.state().items()})


def loaded(path: Path, layout: Layout, schedule: str, head: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of another seed after loading, and the weights after one more step, on rank 0."""
    made = engine(layout, seed=2, schedule=schedule, head=head)
    keeper = store(path, made)
    made.load(keeper.load_latest)
    keeper.close()
    state = together({name: whole(tensor) for name, tensor in made.state().items()})
    stepped(made, 2)
    return state, together({name: whole(weight) for name, weight in made.model.named_parameters()})


def named(layout: Layout, head: str) -> tuple[set[str], set[str]]:
    """Names of this rank's weights; of the weights that its optimizer moves."""
    made = engine(layout, schedule="zbv", head=head)
    names = {id(weight): name for name, weight in made.model.named_parameters()}
    moved = {names[id(weight)] for group in made.optimizer.param_groups for weight in group["params"]}
    return set(names.values()), moved


def known(layout: Layout) -> tuple[int, float, set[str]]:
    made = engine(layout)
    return made.weights, made.step_flops, set(made.describe()["model"])


def evaluated(layout: Layout, schedule: str) -> tuple[float, bool, bool]:
    """Held-out loss; whether gradients are left; whether weights are as they were and in pieces."""
    made = engine(layout, schedule=schedule)
    before = {name: (weight, whole(weight)) for name, weight in made.model.named_parameters()}
    loss = made.evaluate(part(batch(3), made.mesh.data_rank, layout.data_ranks)).loss
    after = dict(made.model.named_parameters())
    kept = all(after[name] is weight and torch.equal(whole(weight), was) for name, (weight, was) in before.items())
    return loss, any(weight.grad is not None for weight in made.model.parameters()), kept


def mistake(layout: Layout, changes: dict[str, Any]) -> str:
    try:
        engine(layout, **changes)
    except ForgeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("head", ["linear", "tied"])
def test_a_checkpoint_of_a_pipeline_is_that_of_the_model_and_continues_on_any_layout(ranks, tmp_path, head):
    first = ranks(4).run(saved, tmp_path, Layout(pp=2, dp_shard=2), "1f1b", head)[0]
    answers = [
        ranks(layout.world_size).run(loaded, tmp_path, layout, schedule, head)[0]
        for layout, schedule in [(Layout(), "1f1b"), (Layout(dp_shard=2), "1f1b"), (Layout(pp=2, tp=2), "zbv")]
    ]
    for state, after in answers:
        assert state.keys() == first.keys()
        assert all(torch.equal(state[name], first[name]) for name in first)
        assert all(torch.allclose(after[name], answers[0][1][name], rtol=1e-9, atol=1e-12) for name in answers[0][1])


def test_a_pipeline_continues_from_the_checkpoint_of_one_process(ranks, tmp_path):
    first = ranks(1).run(saved, tmp_path, Layout(), "1f1b", "tied")[0]
    state, _ = ranks(2).run(loaded, tmp_path, Layout(pp=2), "zbv", "tied")[0]
    assert state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in first)


@pytest.mark.parametrize("head", ["linear", "tied"])
def test_each_weight_has_one_owner_who_moves_it(ranks, head):
    answers = ranks(2).run(named, Layout(pp=2), head)
    ((outer, _), (inner, _)) = answers
    assert all(names == moved for names, moved in answers)
    assert not outer & inner
    assert outer | inner == {name for name, _ in model(Layout(pp=2), head=head).named_parameters()}


def test_every_rank_knows_the_size_the_cost_and_the_names_of_the_whole_model(ranks):
    (alone,) = ranks(1).run(known, Layout())
    assert ranks(2).run(known, Layout(pp=2)) == [alone, alone]


@pytest.mark.parametrize(("layout", "schedule"), [("pp2", "1f1b"), ("pp2-dp2", "zbv")])
def test_an_evaluation_leaves_weights_in_pieces_and_no_gradients(ranks, layout, schedule):
    wanted = Layout.parse(layout)
    ((loss, _, _),) = ranks(1).run(evaluated, Layout(), "1f1b")
    for answer in ranks(wanted.world_size).run(evaluated, wanted, schedule):
        assert answer == (pytest.approx(loss, rel=1e-12), False, True)


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv", "dualpipev"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recompute": "full"}, "each would compute every block again"),
        ({"recompute": "selective"}, "each would compute every block again"),
        ({"compiled": True}, "that of a compiled block is in one piece"),
        ({"zero": 3}, "both need the same gathered weights"),
    ],
    ids=["full", "selective", "compiled", "zero3"],
)
def test_what_a_backward_pass_in_halves_cannot_have_is_refused_with_a_schedule_that_can(schedule, changes, told):
    with pytest.raises(ForgeError, match=told) as caught:
        check_recipe(recipe(Layout(pp=2), schedule=schedule, **changes))
    assert caught.value.fix.endswith("or schedule: interleaved")
    check_recipe(recipe(Layout(pp=2), schedule="interleaved", **changes))


def test_all_problems_of_a_pipeline_are_told_at_once():
    with pytest.raises(Problems) as caught:
        check_recipe(recipe(Layout(pp=4), schedule="dualpipev", recompute="full", stages="1 | 3", zero=3))
    told = [problem.what for problem in caught.value.problems]
    assert [text.split(" ")[0] for text in told] == ["dualpipev", "dualpipev", "the"]


def test_more_stages_than_layers_are_refused_before_the_run():
    with pytest.raises(LayoutError, match="zbv over pp=4 makes 8 stages of 4 layers"):
        check_recipe(recipe(Layout(pp=4), schedule="zbv"))


def test_a_batch_on_its_way_up_must_suit_the_schedule_at_every_size():
    ramp = {"start": 2, "increment": 2, "steps": 2}
    with pytest.raises(LayoutError, match="1f1b over pp=4 cannot run 2 micro-batches"):
        check_recipe(recipe(Layout(pp=4), train={"steps": 4, "batch_warmup": ramp}))
    check_recipe(recipe(Layout(pp=2), train={"steps": 4, "batch_warmup": ramp}))


def test_one_micro_batch_does_not_make_a_pipeline():
    with pytest.raises(LayoutError, match="1f1b over pp=2 cannot run 1 micro-batches") as caught:
        check_recipe(recipe(Layout(pp=2), train={"micro_batch": None}))
    assert caught.value.fix == "micro_batch: 4 makes 2 of the 8 sequences of a data rank"


def test_stages_without_a_pipeline_are_refused():
    with pytest.raises(LayoutError, match=r"'2 \| 2' cuts a pipeline, but pp=1"):
        check_recipe(recipe(Layout(), stages="2 | 2"))


def test_a_rank_without_any_weight_is_refused():
    bare = tiny(
        layout=Layout(pp=2),
        model={"stack": ["one x 4"], "head": "tied", "norm": "none"},
        engine={"kind": "native", "stages": "4 | 0"},
        train=TRAIN,
    )
    with pytest.raises(LayoutError, match=r"rank 1 would hold no weight at all with '4 \| 0'"):
        check_recipe(bare)


def test_the_engine_refuses_what_the_check_refuses(ranks):
    for message in ranks(2).run(mistake, Layout(pp=2), {"stages": "1 | 2"}):
        assert message.startswith("LayoutError: ") and "add up to 3, the model has 4" in message


def test_work_is_that_of_the_whole_model_and_a_head_is_part_of_it():
    made = model(Layout())
    found = staged.work(made, LENGTH)
    matmuls = 4 * 16 * GQA["heads"] * GQA["head_dim"] + 3 * 16 * GLU["inner"]
    pairs = 4 * GQA["heads"] * GQA["head_dim"] * LENGTH * (LENGTH + 1) // 2
    assert found.blocks == (2.0 * matmuls * LENGTH + pairs,) * 4
    assert (found.first, found.last) == (LENGTH * 16, 2.0 * LENGTH * 16 * 32)


def test_parts_of_a_decoder_share_its_modules_under_their_names():
    made = model(Layout())
    one, other = made.part([0, 1], first=True, last=False), made.part([2, 3], first=False, last=True)
    names = [name for each in (one, other) for name, _ in each.named_parameters()]
    assert names == [name for name, _ in made.named_parameters()]
    assert other.get_parameter("blocks.2.ffn.up.weight") is made.get_parameter("blocks.2.ffn.up.weight")
