"""Laws of every registered kind; nothing here names one."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import shardforge.model
from shardforge.core import slots
from shardforge.core.slots import Slot
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.nn.module import Module, declared
from shardforge.nn.sequence import Sequence
from tests.tiny import HIDDEN, LENGTH, VOCAB, tiny
from tests.tiny_kinds import OPTIONS, variants

CASES = variants() | OPTIONS
SLOTS = [slot for slot in vars(slots).values() if isinstance(slot, Slot)]
KINDS = [(slot, kind) for slot in SLOTS for kind in slot.kinds()]


def model_of(case: str, device: str = "cpu") -> nn.Module:
    recipe = tiny(**CASES[case])
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    if device == "cpu":
        model.to_empty(device="cpu")
        fill(model, 1)
    return model


def one_document(rows: int = 2, length: int = LENGTH) -> Sequence:
    positions = torch.arange(length).expand(rows, -1)
    return Sequence(positions, torch.zeros_like(positions), torch.arange(rows), dtype=torch.float64)


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("case", CASES)
def test_logits_have_the_shape_of_the_tokens_and_the_vocabulary(case):
    assert model_of(case)(tokens(), one_document()).shape == (2, LENGTH, VOCAB)


@pytest.mark.parametrize("case", CASES)
def test_the_past_does_not_see_the_future(case):
    model, ids = model_of(case), tokens()
    late = ids.clone()
    late[:, 7:] = (late[:, 7:] + 1) % VOCAB
    before, after = model(ids, one_document()), model(late, one_document())
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_equal_documents_alone(case):
    model, ids = model_of(case), tokens(1)
    cut = 6
    positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])[None]
    documents = (torch.arange(LENGTH) >= cut).long()[None]
    packed = model(ids, Sequence(positions, documents, torch.zeros(1, dtype=torch.int64), dtype=torch.float64))
    first = model(ids[:, :cut], one_document(1, cut))
    second = model(ids[:, cut:], one_document(1, LENGTH - cut))
    torch.testing.assert_close(packed, torch.cat([first, second], 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_one_token_is_a_sequence(case):
    assert model_of(case)(tokens(1, 1), one_document(1, 1)).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_declared_and_has_the_size_of_its_dims(case):
    model = model_of(case, device="meta")
    sizes = {item.fqn: tuple(dim.size for dim in item.dims) for item in declared(model)}
    assert {name: tuple(weight.shape) for name, weight in model.named_parameters()} == sizes


@pytest.mark.parametrize("case", CASES)
def test_every_weight_gets_a_gradient(case):
    model, ids = model_of(case), tokens()
    model(ids, one_document(), ids.roll(-1, 1))["total"].backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not idle


@pytest.mark.parametrize(("slot", "kind"), KINDS, ids=[f"{slot.name}-{kind}" for slot, kind in KINDS])
def test_a_kind_says_where_it_comes_from_what_it_changes_and_what_it_costs(slot, kind):
    text = sys.modules[slot[kind].__module__].__doc__ or ""
    assert text.splitlines()[0].endswith("."), "the first line says what it is"
    assert [word for word in ("Paper:", "Changes:", "Cost:") if f"\n{word}" not in text] == []


@pytest.mark.parametrize(("slot", "kind"), KINDS, ids=[f"{slot.name}-{kind}" for slot, kind in KINDS])
def test_every_field_of_a_kind_says_what_it_means(slot, kind):
    silent = [field.name for field in dataclasses.fields(slot[kind]) if not field.metadata.get("meaning")]
    assert not silent


@pytest.mark.parametrize("path", sorted(Path(shardforge.model.__file__).parent.rglob("*.py")), ids=lambda p: p.stem)
def test_no_file_of_a_model_knows_about_a_mesh(path):
    assert not {"DTensor", "distributed", "DeviceMesh", "ProcessGroup"} & set(re.findall(r"\w+", path.read_text()))


def test_modules_of_models_are_declared_modules():
    undeclared = {
        type(part).__name__
        for case in CASES
        for part in model_of(case, device="meta").modules()
        if part._parameters and not isinstance(part, Module)
    }
    assert not undeclared


def test_hidden_width_is_what_the_recipe_says():
    assert model_of("mixer-gqa", device="meta").embed.weight.shape == (VOCAB, HIDDEN)
