"""What Megatron keeps beside the tensors of a torch_dist checkpoint, made of a source: arguments, optimizer, schedule.

Reference: megatron-core 0.16, the state dicts of its optimizers and of OptimizerParamScheduler, and the
generate_state_dict of Megatron-LM's training script.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from shardforge.convert.format import Options
from shardforge.core.errors import CheckpointError
from shardforge.data.sizes import BatchSizes
from shardforge.families.megatron import MegatronSource
from shardforge.families.source import Source
from shardforge.recipe.load import from_mapping
from shardforge.recipe.schema import Recipe

VERSION = 3.0  # of Megatron-LM's checkpoints
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
TYPED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATA = {"dp_shard", "dp_replicate"}
"""Axes that no argument says: the ranks that are left share the data."""
STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant"}
RATES = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay")
SHARDING = "fully_reshardable"


def sizes(options: Options) -> dict[str, int]:
    """The sizes of a layout as arguments. CheckpointError for an axis that Megatron does not have."""
    layout = dict(options.layout or {})
    if odd := sorted(layout.keys() - SIZES.keys() - DATA):
        what = f"{', '.join(odd)} is no axis of a Megatron training"
        raise CheckpointError(what, "--layout", f"use {', '.join(SIZES)}, dp and rep")
    return {name: int(layout.get(axis, 1)) for axis, name in SIZES.items() if axis != "etp" or axis in layout}


def recipe_of(source: Source) -> Recipe | None:
    return from_mapping(source.beside.recipe).recipe if source.beside.recipe else None


def training(source: Source, dtype: str, step: int, moments: bool) -> dict[str, Any]:
    """Arguments that are not of the model: types, position, optimizer."""
    recipe = recipe_of(source)
    found: dict[str, Any] = {
        "iteration": step,
        "ckpt_format": "torch_dist",
        "params_dtype": TYPED.get(dtype, torch.float32),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "optimizer": "adam",
        "use_distributed_optimizer": moments,
        "dist_ckpt_optim_fully_reshardable": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }
    if recipe is None:
        return found
    train, optim = recipe.train, _adam(recipe)
    return found | {
        "consumed_train_samples": BatchSizes.of(train).before(step),
        "global_batch_size": train.sequences,
        "micro_batch_size": train.micro_batch or 1,
        "train_iters": train.steps,
        "seed": recipe.seed,
        "lr": float(recipe.schedule.at(_peak(recipe), train.steps)),
        "min_lr": _floor(recipe),
        "lr_decay_style": STYLES.get(_kind(recipe), "constant"),
        "lr_warmup_iters": _peak(recipe),
        "lr_decay_iters": getattr(recipe.schedule, "horizon", None) or train.steps,
        "clip_grad": optim["clip"] or 0.0,
        "weight_decay": optim["weight_decay"],
        "adam_beta1": optim["beta1"],
        "adam_beta2": optim["beta2"],
        "adam_eps": optim["eps"],
    }


def content(stacked: bool) -> dict[str, Any]:
    """What tells Megatron how the tensors are cut."""
    return {
        "distrib_optim_sharding_type": SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "non_homogeneous_layers": not stacked,
        "chained_optim_avoid_prefix": True,
    }


def common(source: Source, args: Mapping[str, Any], step: int, count: float | None, stacked: bool) -> dict[str, Any]:
    """The content of common.pt; `count` are the updates of the optimizer, None where its moments stay behind."""
    found: dict[str, Any] = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": VERSION,
        "iteration": step,
        "content_metadata": content(stacked),
    }
    if count is None:
        return found
    recipe, own = recipe_of(source), source.common if isinstance(source, MegatronSource) else {}
    said = {} if recipe else _said(own.get("optimizer"))
    apart = args.get("num_experts") and args["expert_model_parallel_size"] > 1
    whole = _optimizer([_told(each, said) for each in _groups(recipe, step, count, False)], count)
    if apart:  # weights of experts have an optimizer of their own
        both = (_told(each, said) for each in _groups(recipe, step, count, True))
        experts = [each for each in both if each["wd_mult"] or args["add_bias_linear"]]
        found["optimizer"] = {0: whole, 1: _optimizer(experts, count)}
    else:
        found["optimizer"] = whole
    kept = None if recipe else own.get("opt_param_scheduler")
    return {**found, "opt_param_scheduler": kept or _schedule(recipe, args["consumed_train_samples"])}


def _said(optimizer: Any) -> dict[str, Any]:
    """Rates as Megatron's own checkpoint has them, of the first group of weights."""
    if isinstance(optimizer, Mapping):
        groups = optimizer.get("param_groups")
        if isinstance(groups, list) and groups and isinstance(groups[0], Mapping):
            return {key: groups[0][key] for key in RATES if key in groups[0]}
        return next((found for found in map(_said, optimizer.values()) if found), {})
    return {}


def _told(group: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the rates that were said of one that decays."""
    decay = said.get("weight_decay", group["weight_decay"])
    return {**group, **said, "weight_decay": decay * group["wd_mult"]}


def _optimizer(groups: list[dict[str, Any]], count: float) -> dict[str, Any]:
    """Its settings, where each of Megatron's three optimizers looks for them: the distributed one and the one with
    weights in half precision under "optimizer", the plain one at the top."""
    inner = {"param_groups": groups, "state": {"common_step": torch.tensor(count, dtype=torch.float32)}}
    return {**inner, "optimizer": inner, "param_state_sharding_type": SHARDING}


def _groups(recipe: Recipe | None, step: int, count: float, experts: bool) -> Iterator[dict[str, Any]]:
    """Of all weights, then of vectors, which do not decay there."""
    optim = _adam(recipe)
    rate = float(recipe.schedule.at(step, recipe.train.steps)) if recipe else 0.0
    top = float(recipe.schedule.at(_peak(recipe), recipe.train.steps)) if recipe else 0.0
    for multiple in (1.0, 0.0):
        yield {
            "wd_mult": multiple,
            "lr_mult": 1.0,
            "is_expert_parallel": experts,
            "is_decoupled_lr": False,
            "default_config": True,
            "max_lr": top,
            "min_lr": _floor(recipe) if recipe else None,
            "lr": rate,
            "weight_decay": optim["weight_decay"],
            "betas": (optim["beta1"], optim["beta2"]),
            "eps": optim["eps"],
            "bias_correction": True,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "step": count,
        }


def _adam(recipe: Recipe | None) -> dict[str, Any]:
    """The numbers of an AdamW, those of Megatron's parser where there is no recipe."""
    known = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0}
    return {name: getattr(recipe.optim, name, value) for name, value in known.items()} if recipe else known


def _peak(recipe: Recipe) -> int:
    return int(getattr(recipe.schedule, "warmup", 0))


def _floor(recipe: Recipe) -> float | None:
    """The rate at which its schedule ends; None for one that ends at no other."""
    floor = getattr(recipe.schedule, "floor", None)
    return None if floor is None else float(floor) * float(getattr(recipe.schedule, "lr", 0.0))


def _schedule(recipe: Recipe | None, samples: int) -> dict[str, Any]:
    """The state of its scheduler, which counts sequences."""
    found = {"max_lr": 0.0, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_steps": 1, "lr_decay_style": "constant"}
    decay = _adam(recipe)["weight_decay"]
    fixed = {"start_wd": decay, "end_wd": decay, "wd_incr_style": "constant", "wd_incr_steps": 1, "num_steps": samples}
    if recipe is None:
        return found | fixed
    schedule, train = recipe.schedule, recipe.train
    done = BatchSizes.of(train)
    return fixed | {
        "max_lr": float(schedule.at(_peak(recipe), train.steps)),
        "min_lr": _floor(recipe) or 0.0,
        "lr_warmup_steps": done.before(_peak(recipe)),
        "lr_decay_steps": done.before(getattr(schedule, "horizon", None) or train.steps),
        "lr_decay_style": STYLES.get(_kind(recipe), "constant"),
        "wd_incr_steps": done.before(train.steps),
    }


def _kind(recipe: Recipe) -> str:
    return type(recipe.schedule).__name__.lower()


def unsaid(source: Source, moments: bool) -> Iterator[str]:
    """What of the training Megatron has no place for, a line each."""
    recipe = recipe_of(source)
    if recipe is not None:
        yield "for Megatron, the recipe, its data and the state of chance: they go along for the way back"
        if moments and _kind(recipe) not in STYLES:
            yield "for Megatron, the schedule of learning rates: start with --override-opt-param-scheduler"
    elif moments and not (isinstance(source, MegatronSource) and _said(source.common.get("optimizer"))):
        yield "for Megatron, learning rates, which nothing says: start with --override-opt-param-scheduler"
    if moments:
        yield "for Megatron, random numbers of its devices: start with --no-load-rng"
