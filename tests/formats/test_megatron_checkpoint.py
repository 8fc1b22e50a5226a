"""Checkpoints of megatron-core's own training: its model is ours, and its training goes on from what we write.

The other program, `megatron_program`, tells megatron-core that the CPU is a GPU; here nothing of it is imported.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardforge.checkpoint.state import collect
from shardforge.convert.design import updated
from shardforge.convert.format import Options
from shardforge.convert.formats import megatron
from shardforge.convert.pieces import Pieces
from shardforge.core.optional import installed
from shardforge.families.open import open_source
from shardforge.families.source import Source
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from shardforge.recipe.provenance import plain
from tests.tiny import tiny

pytestmark = pytest.mark.slow
KINDS = ("dense-dist", "tied-bf16", "gpt-fp32", "moe-dist", "v3-dist")
TOLERANCE = 2e-6  # float32, relative to the norm of the expected tensor
ROUNDED = 2e-2  # the same where megatron-core computes in bfloat16
PROGRAM = Path(__file__).with_name("megatron_program.py")
RECIPE = {
    "schedule": {"kind": "constant", "lr": 1e-2},
    "optim": {"kind": "adamw", "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "clip": None},
}


def run(verb: str, kind: str, folder: Path, report: Path, world: int = 1) -> dict[str, Any]:
    """What the program said."""
    store = report.with_suffix(f".{verb}.store")
    command = [sys.executable, str(PROGRAM), verb, kind, str(folder), str(report)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(store)], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)
    return torch.load(report)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], tuple[Source, dict[str, Any]]]:
    """trained(kind): what megatron-core saved of that training, and what it said afterwards."""
    if not installed("megatron.core"):
        pytest.skip("megatron-core saves the checkpoints")
    place = tmp_path_factory.mktemp("megatron")
    found: dict[str, dict[str, Any]] = {}

    def saved(kind: str) -> tuple[Source, dict[str, Any]]:
        if kind not in found:
            found[kind] = run("save", kind, place / kind, place / f"{kind}.pt")
        return open_source(place / kind), found[kind]

    return saved


def written(source: Source, folder: Path, **how: Any) -> Path:
    """The folder of the iteration, of a source whose rates a recipe says."""
    recipe = plain(tiny(model=source.model, **RECIPE))
    source.beside = replace(source.beside, recipe=recipe)
    writer = megatron.design(source, Options(to="megatron", **how))
    records = {}
    for file in writer.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Pieces(source) as pieces:
            records[file.name] = writer.write(path, [pieces.part(item) for item in file.items])
    writer.finish(folder, records)
    return writer.opened(folder)


def logits(source: Source, tokens: Tensor) -> Tensor:
    recipe = tiny(model=source.model)
    ours = build(recipe.model, recipe.objective.build()).to_empty(device="cpu")
    ours.load_state_dict({name: source.read(name) for name in source.names})
    with torch.no_grad():
        return answers(ours.eval(), tokens)


def answers(ours: nn.Module, tokens: Tensor) -> Tensor:
    places = torch.arange(tokens.shape[1]).expand(2, -1)
    return ours(tokens, Sequence(places, torch.zeros_like(places), torch.arange(2)))


def apart(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_a_checkpoint_are_those_of_megatron(trained, kind):
    source, said = trained(kind)
    assert apart(logits(source, said["tokens"]), said["logits"]) < (ROUNDED if "bf16" in kind else TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_weights_come_back_bit_for_bit(trained, tmp_path, kind):
    source, _ = trained(kind)
    back = open_source(written(source, tmp_path))
    assert back.moments == source.moments == ("exp_avg", "exp_avg_sq")
    assert all(torch.equal(back.read(name), source.read(name)) for name in source.names)
    assert all(
        torch.equal(back.read_moment(moment, name), source.read_moment(moment, name))
        for name in updated(source)
        for moment in source.moments
    )


@pytest.mark.parametrize(
    ("kind", "how"),
    [("dense", "dist"), ("tied", "bf16"), ("gpt", "fp32"), ("moe", "dist"), ("v3", "dist"), ("mtp", "fp32")],
)
def test_training_goes_on_as_if_it_had_stayed(trained, tmp_path, kind, how):
    source, said = trained(f"{kind}-{how}")
    folder = written(source, tmp_path, dtype="bf16" if how == "bf16" else "source")
    again = run("load", f"{kind}-{how}", folder, tmp_path / "said.pt")
    assert torch.equal(again["logits"], said["logits"]) and again["losses"] == said["losses"]


@pytest.mark.parametrize("kind", ["dense-dist", "v3-dist"])
def test_our_own_training_goes_on_with_the_same_losses(trained, kind):
    source, said = trained(kind)
    recipe = tiny(model=source.model, **RECIPE)
    ours = build(recipe.model, recipe.objective.build()).to_empty(device="cpu")
    optimizer = recipe.optim.build(ours)
    for name, tensor in collect(ours, optimizer).items():
        weight, _, kept = name.removeprefix("optim.").rpartition(".")
        moved = name.startswith("optim.")
        tensor.copy_(source.read_moment(kept, weight) if moved else source.read(name.removeprefix("model.")))
    losses = []
    for rows in said["rows"]:
        loss = F.cross_entropy(answers(ours.train(), rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.schedule.lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(said["losses"], rel=2e-5)


def test_another_optimizer_goes_on_with_the_same_numbers(trained, tmp_path):
    source, said = trained("dense-dist")
    again = run("load", "dense-fp32", written(source, tmp_path), tmp_path / "said.pt")
    assert again["losses"] == said["losses"]


@pytest.mark.parametrize(("kind", "axis"), [("dense-dist", "tp"), ("v3-dist", "ep")])
def test_two_ranks_go_on_with_the_same_losses(trained, tmp_path, kind, axis):
    source, said = trained(kind)
    again = run("load", kind, written(source, tmp_path, layout={axis: 2}), tmp_path / "said.pt", world=2)
    assert apart(again["logits"], said["logits"]) < TOLERANCE
    assert again["losses"] == pytest.approx(said["losses"], rel=TOLERANCE)


def test_rows_of_padding_do_not_change_the_logits_of_words(trained, tmp_path):
    source, said = trained("padded-fp32")
    folder = written(source, tmp_path, layout={"tp": 8})
    again = run("load", "padded-fp32", folder, tmp_path / "said.pt")
    words = source.model["vocab"]
    assert words == 30 and again["logits"].shape[-1] == 32
    assert torch.equal(again["logits"][..., :words], said["logits"][..., :words])
