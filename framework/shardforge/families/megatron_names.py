"""What Megatron calls our weights: one name for each, whichever of its layers and layouts wrote it.

Reference: megatron-core 0.16, the sharded_state_dict of GPTModel with local or Transformer Engine layers. Its files
stack layers, experts and the halves of gated units; here each is a tensor by itself, named as megatron-core names it
under `singleton_local_shards`: "decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w". Norms stand alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardforge.families.forms import EXPERTS, SAME, Form, Padded, Paired, QueryGroups, Stacked
from shardforge.families.section import layers as blocks_of
from shardforge.families.table import Row, layers, rows

TOP = {"embed.places": "embedding.position_embeddings", "norm": "decoder.final_layernorm"}
PLACES = {"blocks.{layer}": "decoder.layers.{layer}", "mtp.{depth}.block": "mtp.layers.{depth}.transformer_layer"}
ROLES = {
    "mixer_residual.norm": "input_layernorm",
    "ffn_residual.norm": "pre_mlp_layernorm",
    "mixer.out": "self_attention.linear_proj",
    "mixer.q_norm": "self_attention.q_layernorm",
    "mixer.k_norm": "self_attention.k_layernorm",
    "mixer.kv_norm": "self_attention.kv_layernorm",
    "mixer.q_down": "self_attention.linear_q_down_proj",
    "mixer.kv_up": "self_attention.linear_kv_up_proj",
    "ffn.down": "mlp.linear_fc2",
    "ffn.router": "mlp.router",
    "ffn.shared.down": "mlp.shared_experts.linear_fc2",
}
SINGLE = {
    "mixer.sinks": "self_attention.core_attention.softmax_offset",
    "ffn.router.selection_bias": "mlp.router.expert_bias",
    "ffn.shared_gate.weight": "mlp.shared_experts.gate_weight",
}
FURTHER = {"embed_norm": "enorm", "hidden_norm": "hnorm", "project": "eh_proj", "norm": "final_layernorm"}
FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}
"""Norms where the matmul behind them holds them -> where they are modules of their own."""
OURS = re.compile(r"(embedding|decoder|output_layer|mtp|shardforge)\..*")
STACK = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
EXPERT = re.compile(r"(.*\.experts\.experts)\.(\d+)\.(.*)")
FC1 = re.compile(r".*linear_fc1\.(weight|bias)")
HALF = re.compile(r"(.*linear_fc1\.(?:weight|bias))_([wv])")


def table(section: Mapping[str, Any], padded: int) -> tuple[Row, ...]:
    """The rows of a whole model section whose tables of words have `padded` rows in Megatron."""
    vocab = section["vocab"]
    form = SAME if padded == vocab else Padded(vocab, padded)
    words = {"embed": "embedding.word_embeddings", "head": "output_layer"}
    found = [*rows(TOP), *rows(words, form), *rows(layers("mtp.{depth}", "mtp.layers.{depth}", FURTHER))]
    found += [Row((f"{{name}}.{each}",), (f"shardforge.{{name}}.{each}",)) for each in ("last_load", "last_loads")]
    block = blocks_of(section)[0]
    for ours, theirs in PLACES.items():
        found += [Row((f"{ours}.{mine}",), (f"{theirs}.{yours}",)) for mine, yours in SINGLE.items()]
        found += rows(layers(ours, theirs, ROLES))
        found += [*_attention(block["mixer"], ours, theirs), *_units(section, ours, theirs)]
    return tuple(found)


def gated(section: Mapping[str, Any]) -> bool:
    """Whether the units of the layers have a gate."""
    return any("glu" in (ffn["kind"], ffn.get("form")) for ffn in (block["ffn"] for block in blocks_of(section)))


def _attention(mixer: Mapping[str, Any], ours: str, theirs: str) -> Iterator[Row]:
    theirs = f"{theirs}.self_attention"
    if mixer["kind"] != "mla":
        form = QueryGroups(mixer["kv_heads"] or mixer["heads"], mixer["head_dim"])
        yield Row(tuple(f"{ours}.mixer.{role}.{{leaf}}" for role in "qkv"), (f"{theirs}.linear_qkv.{{leaf}}",), form)
        return
    query = "linear_q_up_proj" if mixer["q_lora_rank"] else "linear_q_proj"
    yield from rows({f"{ours}.mixer.q": f"{theirs}.{query}"}, _turned(mixer, mixer["heads"], mixer["qk_nope_head_dim"]))
    yield from rows(
        {f"{ours}.mixer.kv_down": f"{theirs}.linear_kv_down_proj"}, _turned(mixer, 1, mixer["kv_lora_rank"])
    )


def _turned(mixer: Mapping[str, Any], heads: int, start: int) -> Form:
    """Latent attention turns neighbouring channels there."""
    half = mixer["position"].get("layout") == "half"
    return Paired(heads, mixer["qk_rope_head_dim"], start) if half else SAME


def _units(section: Mapping[str, Any], ours: str, theirs: str) -> Iterator[Row]:
    """What goes into the feed-forward units, and the experts."""
    halves = {"gate": "_w", "up": "_v"} if gated(section) else {"up": ""}
    experts = f"{theirs}.mlp.experts.experts.{{expert}}"
    for role, half in halves.items():
        for mine, yours in {"ffn": "mlp", "ffn.shared": "mlp.shared_experts"}.items():
            yield Row((f"{ours}.{mine}.{role}.{{leaf}}",), (f"{theirs}.{yours}.linear_fc1.{{leaf}}{half}",))
    inner = {**{role: f"linear_fc1.weight{half}" for role, half in halves.items()}, "down": "linear_fc2.weight"}
    for role, name in inner.items():
        bias = name.replace("weight", "bias")
        yield Row((f"{ours}.ffn.experts.{role}",), (f"{experts}.{name}",), EXPERTS, each="expert")
        yield Row((f"{ours}.ffn.experts.{role}_bias",), (f"{experts}.{bias}",), Stacked(), each="expert")


def common_name(name: str) -> str:
    """The one name of a weight that kinds of Megatron's layers name differently."""
    for fused, alone in FUSED.items():
        name = name.replace(fused, alone)
    return name.replace(".mtp_model_layer.", ".transformer_layer.")


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies in a file: in the one called `key`, under leading indices of so many, as one half of two of
    the dimension behind them."""

    key: str
    lead: tuple[tuple[int, int], ...] = ()
    half: int | None = None

    def box(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Offsets and sizes of a tensor of this shape inside of the one in the file, and that one's whole shape."""
        first, rest = shape[:1], shape[1:]
        start = 0 if self.half is None else self.half * shape[0]
        whole = first if self.half is None else (2 * shape[0],)
        offsets = (*(at for at, _ in self.lead), *((start,) if shape else ()), *(0 for _ in rest))
        return offsets, (*(1 for _ in self.lead), *shape), (*(of for _, of in self.lead), *whole, *rest)


def spot(name: str, stacked: int | None, experts: int) -> Spot:
    """Where Megatron looks for a tensor: with `stacked` layers all of one kind lie in one tensor, None keeps them
    apart; experts always lie together."""
    lead: list[tuple[int, int]] = []
    if stacked is not None and (found := STACK.fullmatch(name)):
        lead.append((int(found[1]), stacked))
        name = f"decoder.layers.{found[2]}"
    if found := EXPERT.fullmatch(name):
        lead.append((int(found[2]), experts))
        name = f"{found[1]}.{found[3]}"
    half = HALF.fullmatch(name)
    return Spot(half[1], tuple(lead), "wv".index(half[2])) if half else Spot(name, tuple(lead))


def spellings(key: str) -> tuple[str, ...]:
    """All names under which some layer of Megatron looks for the tensor `key`, that one first."""
    return (key, *(key.replace(alone, fused) for fused, alone in FUSED.items() if alone in key))
