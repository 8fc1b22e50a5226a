"""A source whose rotary channels are paired in another way is the same function, and comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.families.section import whole
from shardforge.families.source import BARE, Info
from shardforge.families.turned import layouts, paired, turned
from shardforge.nn.sequence import Sequence
from tests.tiny_deepseek import MTP, NORM, decoder, section, shapes, weights

LAYOUTS = ("half", "interleaved")


class Held:
    """See `families.source.Source`."""

    path, moments, counts, beside = Path("held"), ("exp_avg",), ("step",), BARE

    def __init__(self, model: dict[str, Any]):
        self.model, self.weights = model, weights(model)
        self.names = {name: Info(shape, "float32") for name, shape in shapes(model).items()}

    def read(self, name: str) -> Tensor:
        return self.weights[name]

    def read_moment(self, kind: str, name: str) -> Tensor:
        return torch.tensor(7.0) if kind == "step" else self.weights[name] * 2


def grouped(layout: str, **mixer: Any) -> dict[str, Any]:
    """Two layers of grouped attention, the second without positions."""
    position = {"kind": "rope", "layout": layout, "fraction": 0.5}
    told = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "position": position, "bias": "qkv"} | mixer
    rest = {"ffn": {"kind": "glu", "inner": 8}, "residual": "pre"}
    blocks = {"near": {"mixer": told, **rest}, "far": {"mixer": told | {"position": "nope"}, **rest}}
    return whole({"vocab": 32, "hidden": 12, "blocks": blocks, "stack": ["near", "far"], "core": "eager"}, "tiny")


def models(layout: str) -> dict[str, dict[str, Any]]:
    return {
        "latent": section(layout=layout, mtp=MTP),
        "latent, no latent of queries": section(layout=layout, q_lora_rank=None),
        "grouped": grouped(layout),
        "grouped, norm of each head": grouped(layout, qk_norm=NORM),
        "grouped, norm of all heads": grouped(layout, qk_norm=NORM, qk_norm_over="all"),
    }


NAMES = tuple(models("half"))


@pytest.fixture(params=[(name, layout) for name in NAMES for layout in LAYOUTS], ids=str)
def held(request: pytest.FixtureRequest) -> Held:
    name, layout = request.param
    return Held(models(layout)[name])


def other(model: dict[str, Any]) -> dict[str, Any]:
    (layout,) = layouts(model)
    return paired(model, LAYOUTS[1 - LAYOUTS.index(layout)])


def logits(model: dict[str, Any], ours: dict[str, Tensor]) -> Tensor:
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    place = torch.arange(9).expand(2, -1)
    seq = Sequence(place, torch.zeros_like(place), torch.arange(2), dtype=torch.float64)
    with torch.no_grad():
        return decoder(model, ours).double()(tokens, seq)


def test_the_other_pairing_computes_the_same(held):
    there = turned(held, other(held.model))
    before = logits(held.model, held.weights)
    after = logits(there.model, {name: there.read(name) for name in there.names})
    assert torch.allclose(before, after, rtol=0, atol=1e-10 * before.abs().max().item())


def test_the_other_pairing_without_its_rows_computes_something_else(held):
    before, after = logits(held.model, held.weights), logits(other(held.model), held.weights)
    assert not torch.allclose(before, after, rtol=0, atol=1e-4 * before.abs().max().item())


def test_turning_twice_gives_every_bit_back(held):
    again = turned(turned(held, other(held.model)), held.model)
    assert again.model == held.model
    assert all(torch.equal(again.read(name), each) for name, each in held.weights.items())


def test_what_the_optimizer_keeps_moves_with_its_weight(held):
    there = turned(held, other(held.model))
    assert all(torch.equal(there.read_moment("exp_avg", name), there.read(name) * 2) for name in there.names)
    assert there.read_moment("step", next(iter(there.names))) == 7.0


def test_a_source_that_is_paired_alike_is_itself(held):
    assert turned(held, held.model) is held


def test_layers_that_pair_differently_stay_as_they_are():
    mixed = Held(section())
    mixed.model["blocks"]["dense"]["mixer"]["position"]["layout"] = "half"
    assert turned(mixed, section()) is mixed
