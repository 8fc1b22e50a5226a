"""Weights in blocks of FP8: what they stand for, in which type, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.errors import Problems
from shardforge.families.fp8_blocks import FACTORS, decoded, multiplied
from shardforge.families.huggingface import HuggingFaceSource
from shardforge.families.settings import Settings
from shardforge.families.source import Info
from tests.tiny_deepseek import MTP, released, section, weights, written

BLOCK = (4, 8)
TOLD = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
MATRICES = ("_proj.weight", "kv_a_proj_with_mqa.weight")


class Given:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.path, self.tensors = Path("given"), tensors
        kinds = {name: str(each.dtype).removeprefix("torch.") for name, each in tensors.items()}
        self.names = {name: Info(tuple(each.shape), kinds[name]) for name, each in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def factors_of(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.rand([-(-size // side) for size, side in zip(shape, block, strict=True)], generator=generator) + 0.5


def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a release holds them: matrices of layers in FP8 beside their factors, all else in bfloat16 but the biases."""
    out: dict[str, Tensor] = {}
    for name, each in tensors.items():
        if name.endswith(MATRICES) and "eh_proj" not in name:
            out |= {name: each.to(torch.float8_e4m3fn), name + FACTORS: factors_of(tuple(each.shape))}
        else:
            out[name] = each if name.endswith("e_score_correction_bias") else each.bfloat16()
    return out


def problems(tensors: dict[str, Tensor], **told: Any) -> list[str]:
    settings = Settings({"quantization_config": TOLD | told}, Path("config.json"))
    decoded(Given(tensors), settings)
    return [problem.what for problem in settings.problems]


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (1, 1), (128, 5)])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_each_number_is_its_product_in_float32_with_the_factor_of_its_block(shape, wide):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    factors = factors_of(shape, (128, 128))
    row, column = torch.arange(shape[0]) // 128, torch.arange(shape[1]) // 128
    expected = (numbers.double() * factors.double()[row[:, None], column]).float()
    assert torch.equal(multiplied(numbers, factors, (128, 128), wide), expected.to(wide))


def test_a_block_may_have_other_sides_than_128():
    numbers = torch.ones(5, 9).to(torch.float8_e4m3fn)
    factors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    made = multiplied(numbers, factors, BLOCK, torch.float32)
    assert (made[3, 7], made[3, 8], made[4, 7], made[4, 8]) == (1.0, 2.0, 3.0, 4.0)


def test_every_byte_stands_for_what_torch_says():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    made = multiplied(numbers, torch.ones(1, 1), (16, 16), torch.float32)
    assert torch.equal(
        made.view(torch.int32), numbers.float().view(torch.int32)
    )  # which knows -0 and what is no number


@pytest.mark.parametrize("wide", ["bfloat16", "float32"])
def test_a_released_folder_is_read_as_the_weights_that_its_blocks_stand_for(tmp_path, wide):
    model = section(mtp=MTP)
    told, tensors = released(model, weights(model))
    folder = written(tmp_path, told | {"quantization_config": TOLD, "torch_dtype": wide}, quantised(tensors))
    source = HuggingFaceSource(folder)
    name = "blocks.2.mixer.out.weight"
    theirs = quantised(tensors)["model.layers.2.self_attn.o_proj.weight"]
    expected = multiplied(theirs, factors_of(tuple(theirs.shape)), BLOCK, getattr(torch, wide))
    assert torch.equal(source.read(name), expected)


def test_what_is_not_in_fp8_keeps_its_type(tmp_path):
    model = section()
    told, tensors = released(model, weights(model))
    source = HuggingFaceSource(written(tmp_path, told | {"quantization_config": TOLD}, quantised(tensors)))
    names = ("blocks.1.ffn.router.selection_bias", "norm.weight", "blocks.1.ffn.experts.up")
    assert [source.names[name].dtype for name in names] == ["float32", "bfloat16", "bfloat16"]


def test_every_weight_is_read_in_the_type_that_is_told_before(tmp_path):
    model = section(mtp=MTP)
    told, tensors = released(model, weights(model))
    source = HuggingFaceSource(written(tmp_path, told | {"quantization_config": TOLD}, quantised(tensors)))
    read = {name: source.read(name) for name in source.names}
    assert {name: Info(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for name, each in read.items()} == {
        **source.names
    }


def test_the_source_says_that_the_numbers_were_quantised(tmp_path):
    model = section()
    told, tensors = released(model, weights(model))
    source = HuggingFaceSource(written(tmp_path, told | {"quantization_config": TOLD}, quantised(tensors)))
    assert any("fp8" in line for line in source.beside.unread)


def test_all_that_is_wrong_with_the_weights_is_said_at_once(tmp_path):
    model = section()
    told, tensors = released(model, weights(model))
    broken = quantised(tensors)
    del broken["model.layers.0.mlp.up_proj.weight" + FACTORS]
    broken["model.layers.0.mlp.down_proj.weight" + FACTORS] = torch.ones(1, 1)
    folder = written(tmp_path, told | {"quantization_config": TOLD}, broken)
    with pytest.raises(
        Problems, match=r"(?s)down_proj.weight_scale_inv \[3, 3\], which is \[1, 1\].*up_proj.*no model"
    ):
        HuggingFaceSource(folder)


def test_factors_of_a_weight_that_is_not_in_fp8_have_no_place(tmp_path):
    model = section()
    told, tensors = released(model, weights(model))
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)
    with pytest.raises(Problems, match=r"model.norm.weight_scale_inv \[1\] has no place"):
        HuggingFaceSource(written(tmp_path, told | {"quantization_config": TOLD}, tensors))


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
        ({"fmt": "e5m2"}, "fmt='e5m2'"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
        ({"group_size": 64}, "group_size=64"),
    ],
)
def test_another_way_to_quantise_is_an_error_that_names_the_field(told, what):
    (found,) = problems({"a": torch.ones(2)}, **told)
    assert found.startswith(f"quantization_config: {what}")


def test_a_vector_in_fp8_is_an_error():
    numbers = {"a": torch.ones(4).to(torch.float8_e4m3fn), "a" + FACTORS: torch.ones(1)}
    assert problems(numbers) == ["a [4] is float8_e4m3fn, and no matrix"]


def test_an_unknown_type_of_the_model_is_an_error():
    settings = Settings({"quantization_config": TOLD, "torch_dtype": "float8_e4m3fn"}, Path("config.json"))
    decoded(Given({}), settings)
    assert "torch_dtype='float8_e4m3fn'" in settings.problems[0].what


def test_without_quantization_config_tensors_stay_as_they_are():
    given = Given({"a": torch.ones(2)})
    assert decoded(given, Settings({}, Path("config.json"))) is given
