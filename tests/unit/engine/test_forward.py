from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from shardforge.engine.forward import Forward
from shardforge.engine.notes import Notes
from shardforge.nn.batch import Batch
from shardforge.nn.sequence import Sequence

ROWS, LENGTH, LABEL = 4, 3, 1


def pieces() -> list[Batch]:
    columns = [torch.full((ROWS, LENGTH), value) for value in (0, LABEL, 2, 3)]
    return list(Batch(*columns, torch.arange(ROWS)).split(2))


def place(piece: Batch) -> Sequence:
    return Sequence(piece.positions, piece.documents, piece.rows)


def forward(scored: int = 8) -> Forward:
    return Forward(pieces(), place, ("loss",), Notes(("balance",), {(0, "load"): 2, (7, "load"): 2}, (), False), scored)


def objective(x: Tensor, seq: Sequence, labels: Tensor) -> dict[str, Tensor]:
    seq.record("balance", 0, torch.tensor(2.0))
    seq.record("balance", 7, torch.tensor(3.0))
    seq.record("load", 7, torch.tensor([1, 4]))
    return {"total": (x + labels).sum(), "loss": torch.tensor(5.0)}


def test_the_last_part_gives_its_share_of_the_mean_loss():
    assert forward()(objective, None, 1).item() == 2 * LENGTH * LABEL / 8


def test_a_step_in_which_nothing_is_scored_divides_by_one():
    assert forward(scored=0)(objective, None, 1).item() == 2 * LENGTH * LABEL


def test_sums_run_over_layers_and_micro_batches():
    made = forward()
    for micro in range(len(made)):
        made(objective, None, micro)
    assert {name: value.item() for name, value in made.sums.items()} == {"loss": 10.0, "balance": 10.0}


def test_a_part_without_the_objective_knows_its_terms_and_hands_on_the_stream():
    made, stream = forward(), torch.ones(2, LENGTH, 8)
    assert made(lambda x, seq, labels: x, stream, 0) is stream
    assert {name: value.item() for name, value in made.sums.items()} == {"loss": 0.0, "balance": 0.0}


def test_only_the_first_part_reads_tokens():
    seen = SimpleNamespace(inputs=[])

    def part(x: Tensor, seq: Sequence, labels: Tensor) -> Tensor:
        seen.inputs.append(x)
        return x

    made, stream = forward(), torch.ones(2, LENGTH, 8)
    made(part, None, 0)
    made(part, stream, 0)
    assert torch.equal(seen.inputs[0], pieces()[0].tokens) and seen.inputs[1] is stream


def test_tallies_are_kept_layer_by_layer_and_run_over_micro_batches():
    made = forward()
    for micro in range(len(made)):
        made(objective, None, micro)
    assert {key: value.tolist() for key, value in made.tallies.items()} == {(0, "load"): [0, 0], (7, "load"): [2, 8]}


def test_a_step_that_begins_again_forgets_its_sums_and_tells_the_loads():
    told = []

    def part(x: Tensor, seq: Sequence, labels: Tensor) -> dict[str, Tensor]:
        told.append(seq.loads)
        return objective(x, seq, labels)

    made, loads = forward(), {7: torch.ones(2)}
    made(part, None, 0)
    made.begin(loads)
    made(part, None, 1)
    assert told == [None, loads]
    assert made.sums["loss"].item() == 5.0 and made.tallies[7, "load"].tolist() == [1, 4]
