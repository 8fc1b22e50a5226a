"""DeepSeek-V3 and what kept its architecture: R1, V3.1, Moonlight, Kimi-K2. Sigmoid routers with a bias on the choice,
and modules of further tokens behind the last layer.

Paper: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 2; Liu et al. 2025, "Muon is Scalable
    for LLM Training", arXiv:2502.16982 (Moonlight); README_WEIGHTS of the released weights for the modules and FP8.
Limits: no loss for even use is read, because no code that runs these weights has one. `rope_interleave: false`, of
    models whose rotary channels turn i with i + width / 2, is a field of transformers alone. The files keep copies of
    the embedding and the head for each module; they are written, and read where they are there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardforge.families import decoder, deepseek, fp8_blocks
from shardforge.families.family import Family
from shardforge.families.forms import Copies
from shardforge.families.linked import Tensors
from shardforge.families.section import config, layers
from shardforge.families.settings import Settings
from shardforge.families.source import Info
from shardforge.families.table import Row, rows
from shardforge.families.turned import layouts

DEPTH = ("num_nextn_predict_layers", "num_mtp_layers")
LAYER, EMBEDDING, HEAD = "model.layers", "model.embed_tokens", "lm_head"
TABLE, SCORES = "embed_tokens", "shared_head.head"
FURTHER = {"embed_norm": "enorm", "hidden_norm": "hnorm", "project": "eh_proj", "norm": "shared_head.norm"}


def model(settings: Settings) -> dict[str, Any]:
    layout = "interleaved" if settings.get("rope_interleave", True) else "half"
    if weight := settings.get("aux_loss_alpha"):
        settings.note(f"aux_loss_alpha={weight}: no loss for even use is read, a recipe says its own")
    return deepseek.model(settings, router, dense=3, layout=layout, further=depth(settings))


def depth(settings: Settings) -> int:
    """Modules of further tokens that config.json speaks of."""
    return next((deepseek.count(settings, name, 0) for name in DEPTH if settings.get(name)), 0)


def router(settings: Settings) -> dict[str, Any]:
    settings.only("scoring_func", "sigmoid")
    settings.only("topk_method", "noaux_tc")
    groups, kept, k = settings.get("n_group", 8), settings.get("topk_group", 4), settings.get("num_experts_per_tok", 8)
    found: dict[str, Any] = {
        "kind": "topk",
        "score": "sigmoid",
        "weights": "renormalized" if settings.get("norm_topk_prob", True) else "raw",
        "scale": float(settings.get("routed_scaling_factor", 2.5)),
        "selection_bias": {},
    }
    if groups == kept:
        return found
    if k != 2 * kept:
        what = f"num_experts_per_tok={k}, topk_group={kept}: a group is worth its two best experts there"
        settings.wrong(f"{what}, and its num_experts_per_tok / topk_group best ones here")
    return found | {"groups": groups, "group_topk": kept, "group_score": "top_sum"}


def published(section: dict[str, Any]) -> dict[str, Any]:
    found = deepseek.config(section, "DeepseekV3ForCausalLM", "deepseek_v3", routed)
    half = layouts(section) == {"half"}
    further = section["mtp"]["depth"] if section["mtp"] else 0
    return found | {"rope_interleave": not half, "num_nextn_predict_layers": further}


def routed(router: dict[str, Any]) -> dict[str, Any]:
    return {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": router["weights"] == "renormalized",
        "routed_scaling_factor": router["scale"],
        "n_group": router["groups"] or 1,
        "topk_group": router["group_topk"] or 1,
    }


def table(section: dict[str, Any]) -> tuple[Row, ...]:
    """Modules of further tokens stand behind the last layer, each with copies of the embedding and the head."""
    further = [f"{LAYER}.{len(layers(section)) + at}" for at in range((section["mtp"] or {"depth": 0})["depth"])]
    tables, heads = [[f"{each}.{copy}" for each in further] for copy in (TABLE, SCORES)]
    if section["head"]["kind"] == "tied":
        tables, heads = [*tables, *heads], []
    return (
        _copied("embed", EMBEDDING, tables),
        _copied("head", HEAD, heads),
        *(row for at, theirs in enumerate(further) for row in _module(section, f"mtp.{at}", theirs)),
        *deepseek.block(section, "blocks.{layer}", f"{LAYER}.{{layer}}"),
        *rows({"norm": "model.norm"}),
    )


def _copied(ours: str, theirs: str, copies: Sequence[str]) -> Row:
    names = (theirs, *copies)
    return Row((f"{ours}.{{leaf}}",), tuple(f"{name}.{{leaf}}" for name in names), Copies(names))


def _module(section: dict[str, Any], ours: str, theirs: str) -> Iterator[Row]:
    yield from rows({f"{ours}.{mine}": f"{theirs}.{yours}" for mine, yours in FURTHER.items()})
    yield from deepseek.block(section, f"{ours}.block", theirs)


def present(section: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The section without modules of further tokens when the files have nothing of any: transformers leaves them out,
    and keeps their number in config.json."""
    behind = f"{LAYER}.{len(layers(section))}."
    if not section["mtp"] or any(name.startswith(behind) for name in names):
        return section
    used = config(section, "model").layers
    blocks = {name: block for name, block in section["blocks"].items() if name in used}
    return section | {"mtp": None, "blocks": blocks}


def decoded(tensors: Tensors, settings: Settings) -> Tensors:
    """Weights for blocks of FP8, and for copies that the files spare."""
    first, copies = settings.get("num_hidden_layers"), dict[str, str]()
    for at in range(depth(settings)) if type(first) is int else ():
        theirs = f"{LAYER}.{first + at}."
        if any(name.startswith(theirs) for name in tensors.names):
            head = f"{HEAD}.weight" if f"{HEAD}.weight" in tensors.names else f"{EMBEDDING}.weight"
            copies |= {f"{theirs}{TABLE}.weight": f"{EMBEDDING}.weight", f"{theirs}{SCORES}.weight": head}
    spared = {name: of for name, of in copies.items() if name not in tensors.names and of in tensors.names}
    return _Spared(fp8_blocks.decoded(tensors, settings), spared)


class _Spared:
    """Tensors, some of them under further names too."""

    def __init__(self, tensors: Tensors, spared: Mapping[str, str]):
        self.path, self._tensors, self._spared = tensors.path, tensors, spared
        self.names: dict[str, Info] = {**tensors.names, **{name: tensors.names[of] for name, of in spared.items()}}

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self._spared.get(name, name))


FAMILY = Family(
    architectures=("DeepseekV3ForCausalLM",),
    model=model,
    config=published,
    table=table,
    tied=f"{HEAD}.weight",
    spare=decoder.SPARE,
    decoded=decoded,
    present=present,
)
