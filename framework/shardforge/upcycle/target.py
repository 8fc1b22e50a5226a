"""The model that an upcycling makes: the dense one's recipe with mixtures of experts in some layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from shardforge.checkpoint.state import table
from shardforge.core.errors import ForgeError, Problems, RecipeError
from shardforge.core.slots import objectives
from shardforge.model.balance import from_transformers
from shardforge.model.build import build as build_model
from shardforge.recipe.build import build
from shardforge.recipe.model import ModelConfig
from shardforge.recipe.tree import Origin, wrap
from shardforge.upcycle.method import Shape
from shardforge.upcycle.options import Given, Options, chosen

ORDER = {"glu": ("gate", "up", "down"), "mlp": ("up", "down")}
GATES: dict[str, dict[str, Any]] = {
    "renormalized": {"kind": "topk", "order": "score_first", "weights": "renormalized"},
    "raw": {"kind": "topk", "order": "score_first", "weights": "raw"},
    "topk_first": {"kind": "topk", "order": "topk_first", "weights": "renormalized"},
}


@dataclass(frozen=True)
class Layer:
    """One converted layer: the dense ffn as it is, and what becomes of it."""

    number: int
    form: str  # "glu" or "mlp"
    activation: str
    bias: bool
    hidden: int
    dense: int  # neurons of the dense ffn
    expert: int  # neurons of one expert
    experts: int
    group: int  # consecutive experts with the same router row
    shared: int  # neurons of the shared expert
    factor: float  # on every matrix of an expert, and on the biases of its neurons
    output_bias: float  # factor on the bias of down
    std: tuple[tuple[str, float], ...]

    @property
    def matrices(self) -> tuple[str, ...]:
        return ORDER[self.form]

    @property
    def degree(self) -> int:
        """Power of a common factor of all matrices in the output, where the activation is homogeneous."""
        return _degree(self.form, self.activation)

    @property
    def shape(self) -> Shape:
        return Shape(self.dense, self.expert, self.experts, dict(self.std))


@dataclass(frozen=True)
class Target:
    """What will be written: the model section of its recipe, and every weight with shape and dims."""

    model: dict[str, Any]
    layers: tuple[Layer, ...]
    table: dict[str, dict[str, Any]]  # as checkpoint.state.table, of a float32 model
    buffers: frozenset[str]  # names in it that are no weights; they start at zero


def config(model: Mapping[str, Any], what: str) -> ModelConfig:
    """A model section as a config; Problems are said to be of `what`."""
    try:
        return build(ModelConfig, wrap(model, Origin(what)))[0]
    except Problems as found:
        raise Problems(found.problems, f"the model of {what}") from None


def weights(cfg: ModelConfig) -> tuple[dict[str, dict[str, Any]], frozenset[str]]:
    """Every weight and every remembered buffer of a model by name, and the names of the buffers."""
    model = build_model(cfg, objectives["next_token"]().build(), torch.float32)
    found = table(model)
    return found, frozenset(found.keys() - {name for name, _ in model.named_parameters()})


def target(model: Mapping[str, Any], given: Given, what: str) -> Target:
    """The target of a dense `model` section; Problems with all that is wrong with the options for this model."""
    options, cfg = given.options, config(model, what)
    problems: list[ForgeError] = []
    try:
        numbers = chosen(options.layers, len(cfg.layers))
    except ValueError as cause:
        fix = f"all, 'every 2', or indices from 0 to {len(cfg.layers) - 1} like '0,{len(cfg.layers) - 1}'"
        raise Problems([RecipeError(str(cause), given.where("layers"), fix)], "the options") from None
    if options.k > options.experts:
        what_ = f"k={options.k} of experts={options.experts} cannot be chosen"
        problems.append(RecipeError(what_, given.where("k"), f"k: at most {options.experts}"))
    names = dict.fromkeys(cfg.layers[number] for number in numbers)
    for name in names:
        problems += _refused(cfg, name, given, what)
    if problems:
        raise Problems(problems, "the options")
    made = _model(model, cfg, numbers, options)
    found, buffers = weights(config(made, "the result"))
    return Target(made, tuple(_layer(cfg, number, options) for number in numbers), found, buffers)


def factors(options: Options, dense: int, expert: int, degree: int) -> tuple[float, float]:
    """Factor on each matrix and factor on the output bias, arXiv:2410.07524 section 3.3: the chosen experts give
    1 / A of the dense output where router probabilities are even, A = E G / k for raw gates (E = X G experts) and
    A = G where gates add up to 1, and the ffn is homogeneous of `degree` in its weights."""
    if options.scale == "none" or (options.scale == "auto" and not options.method.scaled):
        return 1.0, 1.0
    slices = dense / expert
    gates = options.k / options.experts if options.gate == "raw" else 1.0
    return (slices / gates) ** (1 / degree), 1 / gates


def expert_ffn(options: Options, dense: int) -> int:
    return dense if options.expert_ffn is None else options.expert_ffn


def _refused(cfg: ModelConfig, block: str, given: Given, what: str) -> Iterator[ForgeError]:
    options, ffn = given.options, cfg.blocks[block].ffn
    place = f"{what}  model.blocks.{block}.ffn"
    if ffn.kind == "moe":
        yield RecipeError("this is a mixture of experts already", place, f"leave its layers out with {SKIP}")
        return
    if ffn.kind not in ORDER:
        known = " and ".join(ORDER)
        yield RecipeError(f"kind {ffn.kind!r} cannot be upcycled", place, f"{known} can; leave it out with {SKIP}")
        return
    expert = expert_ffn(options, ffn.inner)
    if expert > ffn.inner:
        text = f"expert_ffn={expert} is more than the {ffn.inner} neurons of the dense ffn"
        yield RecipeError(text, given.where("expert_ffn"), f"at most {ffn.inner}, or leave it empty")
    else:
        for field, text, fix in options.method.refused(ffn.inner, expert, options.experts, options.k):
            yield RecipeError(text, given.where(field), fix)
    if options.shared > ffn.inner:
        text = f"shared={options.shared} is more than the {ffn.inner} neurons of the dense ffn"
        yield RecipeError(text, given.where("shared"), f"at most {ffn.inner}")


SKIP = "upcycle.layers"


def _model(model: Mapping[str, Any], cfg: ModelConfig, numbers: Sequence[int], options: Options) -> dict[str, Any]:
    """The section with a new block for each kind of block that is converted; the old one stays for other layers."""
    order, blocks, renamed = list(cfg.layers), dict(model["blocks"]), {}
    sources = list(dict.fromkeys(order[number] for number in numbers))
    for name in sources:
        new = "moe" if len(sources) == 1 else f"{name}_moe"
        while new in blocks:
            new += "_moe"
        renamed[name] = new
        blocks[new] = {**blocks[name], "ffn": _ffn(cfg.blocks[name].ffn, options)}
    for number in numbers:
        order[number] = renamed[order[number]]
    mtp = (model.get("mtp") or {}).get("block")
    kept = {name: block for name, block in blocks.items() if name in order or name == mtp}
    runs = [(name, len(list(run))) for name, run in groupby(order)]
    return {**model, "blocks": kept, "stack": [f"{name} x {n}" if n > 1 else name for name, n in runs]}


def _ffn(dense: Any, options: Options) -> dict[str, Any]:
    moe: dict[str, Any] = {"kind": "moe", "experts": options.experts, "k": options.k}
    moe |= {"inner": expert_ffn(options, dense.inner), "form": dense.kind}
    moe |= {"activation": dense.activation, "bias": dense.bias, "router": GATES[options.gate]}
    if options.shared:
        same = {"activation": dense.activation, "bias": dense.bias}
        moe["shared"] = {"kind": dense.kind, "inner": options.shared, **same}
    if options.balance:
        loss = from_transformers(options.balance, options.k)
        moe["balance"] = [{"scope": loss.scope, "weight": loss.weight}]
    return moe


def _layer(cfg: ModelConfig, number: int, options: Options) -> Layer:
    ffn = cfg.blocks[cfg.layers[number]].ffn
    expert = expert_ffn(options, ffn.inner)
    factor, output_bias = factors(options, ffn.inner, expert, _degree(ffn.kind, ffn.activation))
    return Layer(
        number=number,
        form=ffn.kind,
        activation=ffn.activation,
        bias=ffn.bias,
        hidden=cfg.hidden,
        dense=ffn.inner,
        expert=expert,
        experts=options.experts,
        group=options.method.group(ffn.inner, expert),
        shared=options.shared,
        factor=factor,
        output_bias=output_bias,
        std=tuple(_std(cfg, ffn.inner).items()),
    )


def _degree(form: str, activation: str) -> int:
    """One for each matrix, and one more where the curve squares: 3 for gated units and squared ReLU, 2 for others."""
    return len(ORDER[form]) + (activation == "relu2")


def _std(cfg: ModelConfig, inner: int) -> dict[str, float]:
    """What model.init gives each matrix, as model.context does for a dense ffn of this width; biases are zero."""
    init = cfg.init
    into = 1 / math.sqrt(cfg.hidden) if init.rule == "fan_in" else init.std
    out = {"flat": init.std, "fan_in": 1 / math.sqrt(inner), "depth_scaled": init.std / math.sqrt(2 * len(cfg.layers))}
    return {"gate": into, "up": into, "down": out[init.rule], "gate_bias": 0.0, "up_bias": 0.0}
