"""Real DeepSpeed on two processes trains small models: its files are read, and go back to it, universal."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shardforge.convert.format import Options
from shardforge.convert.run import convert
from shardforge.core.optional import installed
from shardforge.families.deepspeed import DeepSpeedSource
from shardforge.families.open import open_source
from shardforge.families.source import Source
from tests.tiny import mapping

pytestmark = pytest.mark.skipif(
    not installed("deepspeed"), reason="deepspeed is not installed: pip install -e '.[dev]'"
)

TIMEOUT_S = 240
STEPS, MORE = 3, 2
SAME = 1e-6
"""Relative, in float32: another stage adds gradients in another order. Lost moments or rates show at 1e-4."""
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
CASES: dict[str, dict[str, Any]] = {
    "zero1": {"architecture": "llama", "stage": 1, "schedule": "LambdaLR", "config": {"num_hidden_layers": 2}},
    "zero2": {"architecture": "llama", "stage": 2, "bf16": True, "config": {"tie_word_embeddings": True}},
    "zero3": {"architecture": "qwen2", "stage": 3, "sub_group_size": 2000},
    "alone": {"architecture": "qwen2", "stage": 3, "split": False},
    "mixture": {"architecture": "qwen3_moe", "stage": 2, "config": MIXTURE},
}
AGAIN: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 2},
    "zero2": {"stage": 1},
    "zero3": {"stage": 1},
    "alone": {"stage": 3},
    "mixture": {"stage": 1},
}
"""The stage with which DeepSpeed goes on. With several groups its own ZeRO 3 counts the step once for each of them."""


def case(name: str, **changes: Any) -> dict[str, Any]:
    plain = {"config": {}, "bf16": False, "split": True, "schedule": "", "steps": STEPS, "more": MORE}
    return plain | CASES[name] | changes


def work(folder: Path, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What DeepSpeed answers to each task, in processes of its own."""
    folder.mkdir()
    file = folder / "tasks.json"
    file.write_text(json.dumps(tasks))
    call = [sys.executable, "-m", "tests.formats.deepspeed_ranks", str(file)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(file.with_suffix(".answers").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Name -> its folder, and the losses of the steps after it was saved."""
    root = tmp_path_factory.mktemp("deepspeed")
    tasks = [case(name, save=str(root / name), universal=name in ("zero1", "zero2", "zero3")) for name in CASES]
    answers = work(root / "first", tasks)
    return {name: {"path": root / name, **answer} for name, answer in zip(CASES, answers, strict=True)}


def with_recipe(path: Path) -> Source:
    """The source with the recipe of a run that had the schedule of `deepspeed_ranks.warmup`."""
    source = open_source(path)
    schedule = {"kind": "linear", "lr": 5.0e-2, "warmup": 8}
    recipe = mapping(schedule=schedule, train={"steps": 100, "sequences": 4, "seq_len": 9}) | {"model": source.model}
    source.beside = replace(source.beside, recipe=recipe, extra={"data": {"position": 12}})
    return source


@pytest.fixture(scope="module")
def again(trained, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Name -> what DeepSpeed says when it goes on with a universal checkpoint that was made of a source."""
    root = tmp_path_factory.mktemp("again")
    tasks = []
    for name in CASES:
        opener = with_recipe if name == "zero1" else open_source
        options = Options(to="deepspeed")
        convert(trained[name]["path"], root / name, options, proof="none", processes=1, opener=opener)
        tasks.append(case(name, load=str(root / name), **AGAIN[name]))
    bare = Options(to="deepspeed", moments="drop")
    convert(trained["alone"]["path"], root / "bare", bare, proof="none", processes=1)
    tasks += [case("alone", load=str(root / "bare"), stage=stage, bare=True, more=1) for stage in (2, 3)]
    answers = work(root / "second", tasks)
    return dict(zip([*CASES, "bare2", "bare3"], answers, strict=True))


def kept(trained, name: str) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(trained[name]["path"] / "kept.pt")


def compare(source: DeepSpeedSource, kept: dict[str, dict[str, torch.Tensor]]) -> None:
    """Weights and moments, each made of all that its group has, are those that DeepSpeed gathers itself."""
    assert (source.moments, source.counts) == (("exp_avg", "exp_avg_sq"), ("step",))
    seen = set()
    for group in source.map.groups:
        for kind in ("", *source.moments):
            expected = group.form.ours([kept[name][kind] for name in group.theirs])
            for name, want in zip(group.ours, expected, strict=True):
                got = source.read_moment(kind, name) if kind else source.read(name)
                assert torch.equal(got, want) and got.dtype == torch.float32, (kind, name)
        assert all(source.read_moment("step", name).item() == STEPS for name in group.ours)
        seen.update(group.theirs)
    assert seen == kept.keys()


@pytest.mark.parametrize("name", CASES)
def test_partitions_are_read_as_what_deepspeed_holds(trained, name):
    source = open_source(trained[name]["path"])
    assert isinstance(source, DeepSpeedSource) and source.beside.step == STEPS
    compare(source, kept(trained, name))


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_universal_checkpoint_of_deepspeed_is_read_as_the_partitions(trained, name):
    compare(DeepSpeedSource(trained[name]["path"] / "step_universal"), kept(trained, name))


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_goes_on_with_the_losses_of_the_training_that_stayed(trained, again, name):
    assert again[name]["step"] == STEPS
    assert again[name]["losses"] == pytest.approx(trained[name]["losses"], rel=SAME)


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_without_moments_begin_where_they_stood(trained, again, stage):
    assert again[f"bare{stage}"]["losses"] == trained["alone"]["losses"][:1]


def test_recipe_and_position_travel_in_the_client_state(again):
    note = again["zero1"]["client"]
    assert note["extra"] == {"data": {"position": 12}} and note["recipe"]["schedule"]["warmup"] == 8


def test_what_stays_behind_is_listed(trained):
    unread = open_source(trained["zero1"]["path"]).beside.unread
    assert [line.split(":")[0] for line in unread] == ["place", "lr_scheduler", "ds_config"]
