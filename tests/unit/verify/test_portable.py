from __future__ import annotations

import dataclasses

from shardforge.core.slots import cores
from shardforge.engine.kinds.native import NativeConfig
from shardforge.verify.portable import FP64, portable
from tests.tiny import tiny


def test_a_recipe_that_runs_as_it_is_leaves_nothing_unproved():
    assert portable(tiny())[1] == []


def test_everything_is_computed_in_fp64_and_the_rounding_is_not_proved():
    recipe, notes = portable(tiny(precision={"master": "fp32", "compute": "bf16", "reduce": "fp32"}))
    assert recipe.precision == FP64
    assert notes == ["rounding: bf16 compute, fp32 weights and fp32 sums run as fp64"]


def test_optimizer_states_are_as_wide_as_the_weights():
    recipe, notes = portable(tiny(optim={"kind": "adamw", "states": "bf16"}))
    assert recipe.optim.states == "master" and notes == ["optim.states=bf16 is verified as master"]


def test_what_needs_a_gpu_or_a_compiler_has_a_stand_in_and_is_named():
    engine = NativeConfig(compiled=True, dispatch="deepep", stages="1 | 1")
    recipe, notes = portable(dataclasses.replace(tiny(), engine=engine))
    assert recipe.engine == NativeConfig()
    assert notes == [
        "engine.compiled=true is verified as false",
        "engine.stages=1 | 1 is verified as cut by cost",
        "engine.dispatch=deepep is verified as auto",
    ]


def test_attention_is_computed_by_a_core_that_runs_here():
    recipe, notes = portable(tiny(model={"core": "flex"}))
    assert recipe.model.core == cores["auto"]() and notes == ["model.core=flex is verified with auto"]


def test_options_that_run_here_stay():
    engine = NativeConfig(recompute="full", zero=1, context="ring")
    assert portable(dataclasses.replace(tiny(), engine=engine))[0].engine == engine
