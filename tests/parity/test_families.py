"""Every family there and back: transformers -> ShardForge -> transformers, with the same numbers on all three sides."""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardforge.families.huggingface import HuggingFaceSource
from shardforge.families.publish import Published, publish
from shardforge.families.section import apart
from shardforge.families.statemap import StateMap
from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.nn.sequence import Sequence
from tests.parity import family_cases
from tests.parity.compare import distance, quiet
from tests.parity.family_cases import Case
from tests.parity.models import random_weights
from tests.parity.models_moe import changed
from tests.tiny import tiny

transformers = pytest.importorskip("transformers", reason="the transformers package is the reference")


def found() -> dict[str, Case]:
    """The cases of every module of `family_cases`."""
    modules = [f"{family_cases.__name__}.{module.name}" for module in pkgutil.iter_modules(family_cases.__path__)]
    return {name: case for module in modules for name, case in importlib.import_module(module).CASES.items()}


CASES = found()


@dataclass(frozen=True)
class Taken:
    """A case on its way: their model, its folder, what is read of it, and the folder that is made of that."""

    case: Case
    theirs: nn.Module
    folder: Path
    source: HuggingFaceSource
    published: Published
    back: Path

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randint(0, self.case.vocabulary, (2, self.case.length), generator=generator)

    def ours(self) -> Decoder:
        recipe = tiny(model=changed(self.source.model, lambda ffn: {"balance": []}))  # the tests take no such loss
        model = build(recipe.model, recipe.objective.build())
        model.to_empty(device="cpu")
        model.load_state_dict({name: self.source.read(name) for name in self.source.names})
        return model.eval()

    def our_logits(self, ours: Decoder) -> Tensor:
        tokens = self.tokens()
        positions = torch.arange(self.case.length).expand(2, -1)
        return ours(tokens, Sequence(positions, torch.zeros_like(positions), torch.arange(2)))


def their_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(case.config())
    random_weights(theirs)
    case.prepare(theirs)
    return theirs.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the names in its files."""
    from safetensors.torch import load_file

    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def write(folder: Path, published: Published, source: HuggingFaceSource) -> None:
    """The weights of a source in the words of a family, as a conversion does it, without its care."""
    from safetensors.torch import save_file

    shapes = {name: info.shape for name, info in source.names.items()}
    made = StateMap(published.family.table(source.model), shapes).to(source.read)
    folder.mkdir()
    save_file({name: each.contiguous().clone() for name, each in made}, folder / "model.safetensors", {"format": "pt"})
    length = {"max_position_embeddings": source.beside.length}
    (folder / "config.json").write_text(json.dumps(length | published.config | source.beside.tokens))


@pytest.fixture(scope="module", params=CASES)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    case, path = CASES[request.param], tmp_path_factory.mktemp("family")
    with quiet():
        theirs = their_model(case)
        theirs.save_pretrained(path / "theirs")
    case.stored(path / "theirs")
    source = HuggingFaceSource(path / "theirs")
    published = publish(source.model, request.param)
    write(path / "back", published, source)
    yield Taken(case, theirs, path / "theirs", source, published, path / "back")


def reloaded(taken: Taken) -> nn.Module:
    config: Any = taken.theirs.config
    how = {"attn_implementation": config._attn_implementation, "experts_implementation": config._experts_implementation}
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(taken.back, **how).eval()


def test_logits_are_those_of_transformers(taken):
    with quiet(), torch.no_grad():
        assert distance(taken.our_logits(taken.ours()), taken.theirs(taken.tokens()).logits) < taken.case.tolerance


def test_every_gradient_is_that_of_transformers(taken, tmp_path):
    tokens, ours, theirs = taken.tokens(), taken.ours(), copy.deepcopy(taken.theirs)
    with quiet():
        logits = theirs(tokens).logits
    F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum").backward()
    F.cross_entropy(taken.our_logits(ours).flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum").backward()
    for weight in theirs.parameters():
        weight.data = weight.grad
    with quiet():
        theirs.save_pretrained(tmp_path)  # so that the gradients go the way of the weights
    expected = HuggingFaceSource(tmp_path)
    got = {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}
    assert got.keys() == {name for name, _ in ours.named_parameters()} & expected.names.keys()
    far = {name: distance(grad, expected.read(name), least=1.0) for name, grad in got.items()}
    assert not {name: each for name, each in far.items() if not each < taken.case.tolerance}


def test_every_tensor_comes_back_bit_for_bit(taken):
    before, after = tensors(taken.folder), tensors(taken.back)
    assert before.keys() == after.keys()
    assert not [name for name, each in before.items() if not torch.equal(each, after[name])]


def test_transformers_loads_what_comes_back_as_the_model_that_it_was(taken):
    again, before = reloaded(taken), taken.theirs.state_dict()
    assert again.state_dict().keys() == before.keys()
    assert not [name for name, each in again.state_dict().items() if not torch.equal(each, before[name])]


def test_what_comes_back_computes_the_same_bit_for_bit(taken):
    tokens = taken.tokens()
    with quiet(), torch.no_grad():
        assert torch.equal(reloaded(taken)(tokens).logits, taken.theirs(tokens).logits)


@pytest.mark.parametrize("training", [False, True])
def test_what_comes_back_is_read_as_the_same_model(taken, training):
    again = HuggingFaceSource(taken.back)
    assert apart(taken.source.model, again.model, training=training) == []
    assert not taken.published.left
