"""With feed-forward layers that do what a mixture does beside computing: note, remember, settle, ask for a count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shardforge.checkpoint.store import Store
from shardforge.core.dims import Dim
from shardforge.core.layout import Layout
from shardforge.engine.native import NativeEngine
from shardforge.engine.notes import Notes
from shardforge.model.build import build
from shardforge.model.ffns.glu import GLU
from shardforge.nn.batch import PADDING
from shardforge.nn.sequence import Sequence
from shardforge.observe.experts import ExpertTally
from shardforge.recipe.schema import CheckpointConfig
from tests.equivalence.cases import together, whole
from tests.equivalence.rows import padded
from tests.tiny import LENGTH, SEQUENCES, part, tiny

KINDS, STEPS = 4, 10
DROPPED = {"residual": {"kind": "pre", "dropout": 0.5}}
LAYOUTS = ["one", "dp2", "cp2", "pp2", "rep2-dp2", "pp2-dp2"]


@dataclass
class Seen:
    """What one layer of this rank went through."""

    forwards: list[tuple[bool, float, Tensor | None]] = field(default_factory=list)  # grad, sum of x, loads
    settled: list[tuple[float, dict[int, list[float]]]] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)


@contextmanager
def watched(counting: bool = False) -> Iterator[dict[int, Seen]]:
    """A layer counts its tokens by their position in the document, as if that were an expert."""
    seen: dict[int, Seen] = {}
    init, plain = GLU.__init__, GLU.forward

    def begin(self: GLU, cfg: Any, ctx: Any) -> None:
        init(self, cfg, ctx)
        self.layer = ctx.layer
        self.remember("selection_bias", Dim("router", KINDS))

    def forward(self: GLU, x: Tensor, seq: Sequence) -> Tensor:
        mine = seen.setdefault(self.layer, Seen())
        loads = None if seq.loads is None else seq.loads[self.layer]
        mine.forwards.append((torch.is_grad_enabled(), x.sum().item(), loads))
        mine.progress.append(seq.progress)
        real = seq.documents != PADDING
        seq.record("load", self.layer, torch.bincount(((seq.positions + self.layer) % KINDS)[real], minlength=KINDS))
        seq.record("router", self.layer, real.sum() * torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
        return plain(self, x, seq)

    def settle(self: GLU, loads: Mapping[int, Tensor], progress: float) -> None:
        told = {layer: load.tolist() for layer, load in loads.items()}
        seen.setdefault(self.layer, Seen()).settled.append((progress, told))
        load = loads[self.layer]
        self.selection_bias += (load.mean() - load).sign().float()

    options = {"forward": forward, "settle": settle, "counts_now": counting, "__init__": begin}
    with patch.multiple(GLU, tallies={"load": KINDS, "router": 3}, **options, create=True):
        yield seen


def engine(layout: Layout, **changes: Any) -> NativeEngine:
    train = {"steps": STEPS, "sequences": SEQUENCES, "seq_len": LENGTH, "micro_batch": 2}
    recipe = tiny(layout=layout, **{"train": train} | changes)
    return recipe.engine.build(recipe, torch.device("cpu"))


def stepped(made: NativeEngine, step: int) -> dict[int, ExpertTally]:
    mine = part(padded(step), made.mesh.data_rank, made.recipe.parallel.data_ranks)
    found = made.forward_backward(mine, step).experts
    made.update(0.01)
    return dict(found)


def biases(made: NativeEngine) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in made.model.named_buffers() if "selection_bias" in name}


def tallied(layout: Layout) -> tuple[list[dict[int, ExpertTally]], dict[str, list[float]]]:
    """The tallies of two steps, and what this rank remembers then."""
    with watched():
        made = engine(layout)
        return [stepped(made, step) for step in range(2)], biases(made)


def gone_through(layout: Layout, counting: bool, changes: dict[str, Any]) -> dict[int, Seen]:
    """Two steps and an evaluation."""
    with watched(counting) as seen:
        made = engine(layout, **changes)
        for step in range(2):
            stepped(made, step)
        made.evaluate(part(padded(7), made.mesh.data_rank, layout.data_ranks))
        return seen


def told(layout: Layout, changes: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the terms of a step, and of an evaluation."""
    made = engine(layout, **changes)
    mine = part(padded(0), made.mesh.data_rank, layout.data_ranks)
    return list(made.forward_backward(mine, 0).terms), list(made.evaluate(mine).terms)


def unmoved(layout: Layout) -> bool:
    """Whether evaluations and a step without its update leave what is remembered alone."""
    with watched(counting=True):
        made = engine(layout)
        stepped(made, 0)
        before, mine = biases(made), part(padded(3), made.mesh.data_rank, layout.data_ranks)
        made.evaluate(mine)
        made.forward_backward(mine, 1)
        made.evaluate(mine)
        return biases(made) == before and any(map(any, before.values()))


def saved(path: Path, layout: Layout) -> dict[str, Tensor]:
    with watched():
        made = engine(layout)
        for step in range(2):
            stepped(made, step)
        store = Store(path, CheckpointConfig(), describe=made.describe())
        store.save(2, made.state(), {}, wait=True)
        store.close()
        return together({name: whole(tensor) for name, tensor in made.state().items()})


def loaded(path: Path, layout: Layout) -> dict[str, Tensor]:
    with watched():
        made = engine(layout, seed=2)
        store = Store(path, CheckpointConfig(), describe=made.describe())
        made.load(store.load_latest)
        store.close()
        return together({name: whole(tensor) for name, tensor in made.state().items()})


def on(ranks: Any, layout: str, run: Callable, *args: Any) -> list[Any]:
    wanted = Layout.parse(layout)
    return ranks(wanted.world_size).run(run, wanted, *args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tallies_are_of_the_whole_batch_on_every_rank_of_any_layout(ranks, layout):
    steps = []
    for step in range(2):
        given = padded(step)
        real = given.documents != PADDING
        tokens = real.sum().item()
        counts = [torch.bincount(((given.positions + layer) % KINDS)[real], minlength=KINDS) for layer in range(2)]
        loads = [tuple(map(float, count.tolist())) for count in counts]
        steps.append([ExpertTally(load, tokens, 0.5 * tokens, 0.25 * tokens) for load in loads])
    for tallies, _ in on(ranks, layout, tallied):
        assert [[(t.load, t.tokens, t.entropy, t.dropped) for t in each.values()] for each in tallies] == [
            [(t.load, t.tokens, t.entropy, t.dropped) for t in each] for each in steps
        ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_tells_the_biases_of_all_layers_as_they_were_in_the_step(ranks, layout):
    ((_, remembered),) = on(ranks, "one", tallied)
    for tallies, _ in on(ranks, layout, tallied):
        assert [tally.bias for tally in tallies[0].values()] == [(0.0, 0.0)] * 2
        assert [tally.bias for tally in tallies[1].values()] == [(-1.0, 1.0)] * 2
    assert all(max(map(abs, bias)) > 1 for bias in remembered.values())  # a step later


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_remembered_is_the_same_on_every_layout(ranks, layout):
    ((_, alone),) = on(ranks, "one", tallied)
    found: dict[str, list[float]] = {}
    for _, mine in on(ranks, layout, tallied):
        assert all(found.setdefault(name, bias) == bias for name, bias in mine.items())
    assert found == alone


@pytest.mark.parametrize("layout", ["one", "pp2"])
@pytest.mark.parametrize("changes", [{}, {"engine": {"kind": "native", "recompute": "full"}}], ids=["kept", "again"])
def test_a_step_is_settled_once_with_all_layers_and_the_share_of_steps_done(ranks, layout, changes):
    for seen in on(ranks, layout, gone_through, False, changes):
        for each in seen.values():
            assert [progress for progress, _ in each.settled] == [0.1, 0.2]
            assert [list(loads) for _, loads in each.settled] == [[0, 1]] * 2


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2"])
def test_forward_passes_know_the_share_of_the_steps_that_is_done(ranks, layout):
    for seen in on(ranks, layout, gone_through, False, {}):
        for each in seen.values():
            assert sorted(set(each.progress)) == [0.0, 0.1, 0.2]


@pytest.mark.parametrize("layout", ["one", "dp2", "cp2", "pp2-dp2"])
def test_a_count_runs_before_the_gradients_with_the_same_chance(ranks, layout):
    for seen in on(ranks, layout, gone_through, True, DROPPED):
        for each in seen.values():
            micro = len(each.forwards) // 5  # two passes of two steps, and an evaluation
            first = [each.forwards[at * micro : (at + 1) * micro] for at in range(5)]
            assert [grads for one in first for grads, _, _ in one] == (
                ([False] * micro + [True] * micro) * 2 + [False] * micro
            )
            assert [x for _, x, _ in first[0]] == [x for _, x, _ in first[1]]
            assert [x for _, x, _ in first[2]] == [x for _, x, _ in first[3]]


@pytest.mark.parametrize("layout", ["one", "dp2", "cp2", "pp2"])
def test_a_count_tells_the_gradients_the_loads_of_the_whole_batch(ranks, layout):
    for seen in on(ranks, layout, gone_through, True, {}):
        for layer, each in seen.items():
            told = [(grads, None if loads is None else loads.tolist()) for grads, _, loads in each.forwards]
            assert all(loads is None for grads, loads in told if not grads)
            steps = [loads for grads, loads in told if grads]
            half = len(steps) // 2
            assert steps == [each.settled[0][1][layer]] * half + [each.settled[1][1][layer]] * half


def test_without_a_module_that_asks_there_is_one_forward_pass_and_no_loads(ranks):
    (seen,) = on(ranks, "one", gone_through, False, {})
    assert [grads for grads, _, _ in seen[0].forwards] == [True] * 8 + [False] * 4
    assert all(loads is None for _, _, loads in seen[0].forwards)


@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_only_an_update_changes_what_is_remembered(ranks, layout):
    assert all(on(ranks, layout, unmoved))


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2"])
def test_an_evaluation_tells_no_losses_that_depend_on_its_micro_batches(ranks, layout):
    loss = {"scope": "batch", "weight": 0.5}
    changes = {"ffn": {"kind": "moe", "experts": 4, "k": 2, "inner": 8, "balance": [loss]}}
    changes |= {"objective": {"kind": "next_token", "z_loss": 0.1}}
    for training, held_out in on(ranks, layout, told, changes):
        assert set(training) == {"balance", "z_loss"} and set(held_out) == {"z_loss"}


@pytest.mark.parametrize("layout", ["pp2-dp2", "tp2", "cp2"])
def test_what_is_remembered_is_saved_and_goes_on_elsewhere_exactly(ranks, tmp_path, layout):
    first = ranks(2).run(saved, tmp_path, Layout.parse("dp2"))[0]
    wanted = Layout.parse(layout)
    again = ranks(wanted.world_size).run(loaded, tmp_path, wanted)[0]
    names = [name for name in first if "selection_bias" in name]
    assert len(names) == 2 and all(first[name].any() for name in names)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_model_without_experts_notes_nothing_and_is_saved_as_before():
    recipe = tiny()
    model = build(recipe.model, recipe.objective.build())
    assert Notes.of(model) == Notes((), {}, (), False)
    assert not dict(model.named_buffers())
