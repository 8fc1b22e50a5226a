"""DeepSeek's folders through a whole conversion: proved by transformers, and checked again afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardforge.convert.check import check
from shardforge.families.open import open_source
from shardforge.families.turned import layouts
from tests.parity.compare import quiet
from tests.tiny_deepseek import MTP, SOFTMAX, released, section, weights, written
from tests.unit.convert.folders import converted
from tests.unit.families.test_fp8_blocks import TOLD, quantised

pytest.importorskip("transformers", reason="the transformers package is the reference")

EVEN = {"kv_lora_rank": 4}
"""Latents of an odd width are more than transformers takes for DeepSeek-V2."""


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A release in FP8 with modules of further tokens."""
    model = section(mtp=MTP)
    told, tensors = released(model, weights(model))
    return written(
        tmp_path / "fp8", told | {"quantization_config": TOLD, "torch_dtype": "bfloat16"}, quantised(tensors)
    )


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A run of DeepSeek-V2's architecture whose rotary channels turn in halves."""
    model = section(SOFTMAX, **EVEN)
    folder = written(tmp_path / "published", *released(model, weights(model)))
    path = converted(folder, tmp_path / "run", "shardforge").path
    recipe = path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("layout: interleaved", "layout: half"))
    (path / "conversion.json").unlink()
    return path


def test_a_release_in_fp8_becomes_a_folder_that_transformers_proves(blocks, tmp_path):
    with quiet():
        made = converted(blocks, tmp_path / "wide", proof="auto")
    assert made.certificate["proof"]["method"] == "transformers"
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())


def test_a_release_in_fp8_keeps_its_modules_and_their_copies(blocks, tmp_path):
    converted(blocks, tmp_path / "wide")
    before = {name for name in load_file(blocks / "model.safetensors") if not name.endswith("_scale_inv")}
    after = load_file(tmp_path / "wide" / "model.safetensors")
    assert after.keys() == before
    biases = {each.dtype for name, each in after.items() if name.endswith("e_score_correction_bias")}
    assert biases == {torch.float32}


def test_what_was_made_of_a_release_in_fp8_goes_to_ours_and_back_without_a_bit_changed(blocks, tmp_path):
    converted(blocks, tmp_path / "wide")
    converted(blocks, tmp_path / "ours", "shardforge")
    converted(tmp_path / "ours", tmp_path / "back")
    wide, back = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "back"))
    assert wide.keys() == back.keys()
    assert not [
        name for name, each in wide.items() if back[name].dtype != each.dtype or not torch.equal(back[name], each)
    ]


def test_a_run_whose_channels_turn_in_halves_becomes_a_folder_that_transformers_proves(halves, tmp_path):
    with quiet():
        made = converted(halves, tmp_path / "pairs", proof="auto")
    assert made.certificate["proof"]["method"] == "transformers"
    assert (layouts(open_source(halves).model), layouts(open_source(made.path).model)) == ({"half"}, {"interleaved"})


def test_a_folder_with_channels_in_another_order_is_checked_against_what_was_read(halves, tmp_path):
    converted(halves, tmp_path / "pairs")
    with quiet():
        found = check(tmp_path / "pairs", proof="own")
    assert found.weights == len(open_source(halves).names)
