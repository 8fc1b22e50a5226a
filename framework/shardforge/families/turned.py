"""Rotary channels that turn together: i with i + width / 2, or 2 i with 2 i + 1. One function, rows in another order.

Paper: Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 34; see `model.positions.rope`, whose `layout` this is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from shardforge.families.forms import Paired
from shardforge.families.section import layers
from shardforge.families.source import Beside, Info, Source


def layouts(section: Mapping[str, Any]) -> set[str]:
    """How the layers of a whole model section pair their channels; none for layers without rotary positions."""
    return {each["layout"] for each in _positions(section) if each["kind"] == "rope"}


def paired(section: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """A whole model section whose layers all pair their channels so."""
    blocks: dict[str, dict[str, Any]] = {}
    for name, block in section["blocks"].items():
        position = block["mixer"].get("position") or {}
        told = position | {"layout": layout} if position.get("kind") == "rope" else position
        blocks[name] = block | {"mixer": block["mixer"] | {"position": told}} if position else block
    return {**section, "blocks": blocks}


def turned(source: Source, model: Mapping[str, Any]) -> Source:
    """The source as a model would be that pairs channels as the whole section `model` does; itself where it does so, or
    where layers of one of the two do not all pair them alike."""
    here, there = layouts(source.model), layouts(model)
    if here == there or len(here) != 1 or len(there) != 1:
        return source
    return Turned(source, *there)


class Turned:
    """See `families.source.Source`: another one with the rows of turning channels in the order of `layout`."""

    def __init__(self, source: Source, layout: str):
        self.of, self._layout = source, layout
        self.path, self.model = source.path, paired(source.model, layout)
        self.names: Mapping[str, Info] = source.names
        self.moments, self.counts = source.moments, source.counts
        self.beside: Beside = source.beside
        self._forms = {name: form for name, form in _forms(source.model) if name in source.names}

    def read(self, name: str) -> Tensor:
        return self._moved(name, self.of.read(name))

    def read_moment(self, kind: str, name: str) -> Tensor:
        kept = self.of.read_moment(kind, name)
        return self._moved(name, kept) if kind in self.moments else kept

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        form = self._forms.get(name)
        if form is None:
            return tensor
        (made,) = form.theirs([tensor]) if self._layout == "interleaved" else form.ours([tensor])
        return made


def _positions(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [block["mixer"].get("position") or {"kind": "none"} for block in _blocks(section).values()]


def _blocks(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The block behind each name in the model."""
    found = {f"blocks.{at}": block for at, block in enumerate(layers(section))}
    mtp = section["mtp"] or {"depth": 0}
    return found | {f"mtp.{at}.block": section["blocks"][mtp["block"]] for at in range(mtp["depth"])}


def _forms(section: Mapping[str, Any]) -> Iterator[tuple[str, Paired]]:
    """Names of weights with turning rows, some of which the model may lack."""
    for block, told in _blocks(section).items():
        mixer = told["mixer"]
        position = mixer.get("position") or {}
        if position.get("kind") != "rope":
            continue
        if mixer["kind"] == "mla":
            width = int(mixer["qk_rope_head_dim"] * position["fraction"])
            yield f"{block}.mixer.q.weight", Paired(mixer["heads"], width, mixer["qk_nope_head_dim"])
            yield f"{block}.mixer.kv_down.weight", Paired(1, width, mixer["kv_lora_rank"])
        elif mixer["kind"] == "gqa":
            width = int(mixer["head_dim"] * position["fraction"])
            for role, heads in (("q", mixer["heads"]), ("k", mixer["kv_heads"] or mixer["heads"])):
                normed = heads if mixer["qk_norm_over"] == "all" else 1
                yield f"{block}.mixer.{role}.weight", Paired(heads, width)
                yield f"{block}.mixer.{role}.bias", Paired(heads, width)
                yield f"{block}.mixer.{role}_norm.weight", Paired(normed, width)
                yield f"{block}.mixer.{role}_norm.bias", Paired(normed, width)
