"""The weights of every family have the names and shapes that they have in the module that transformers trains."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import nn

from shardforge.checkpoint.state import table
from shardforge.families.huggingface import family_of, model_of
from shardforge.families.section import config as config_of
from shardforge.families.settings import Settings
from shardforge.families.source import Info
from shardforge.families.statemap import StateMap
from shardforge.families.trained import trained
from shardforge.model.build import build
from tests.parity import family_cases
from tests.parity.family_cases import Case

transformers = pytest.importorskip("transformers", reason="the transformers package is the reference")

MODULES = [
    importlib.import_module(f"{family_cases.__name__}.{each.name}")
    for each in pkgutil.iter_modules(family_cases.__path__)
]
CASES: dict[str, Case] = {name: case for module in MODULES for name, case in module.CASES.items()}


def module_of(case: Case) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(case.config())


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_the_module(name):
    theirs = module_of(CASES[name])
    kept = {name for name, _ in theirs.named_parameters()} | {name for name, _ in theirs.named_buffers()}
    held = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if name in kept}
    told = json.loads(theirs.config.to_json_string()) | {"architectures": [type(theirs).__name__]}
    settings = Settings(told, Path("config.json"))
    family = family_of(settings)
    section, _ = model_of(family, settings, {name: Info(shape, "float32") for name, shape in held.items()})
    ours = build(config_of(section, "config.json"), nn.Identity())
    shapes = {name: tuple(row["shape"]) for name, row in table(ours).items()}
    found: dict[str, tuple[int, ...]] = {}
    for group in StateMap(trained(family.table(section)), shapes).groups:
        made = group.form.theirs([torch.empty(shapes[each], device="meta") for each in group.ours])
        found |= {each: tuple(tensor.shape) for each, tensor in zip(group.theirs, made, strict=True)}
    assert found == held
