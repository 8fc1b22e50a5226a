from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.errors import Problems
from shardforge.families.mxfp4 import BYTES, decoded, unpacked
from shardforge.families.settings import Settings
from shardforge.families.source import Info

QUANTISED = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
EXPERTS, ROWS, COUNT = 3, 5, 2


class Held:
    """Tensors in memory."""

    path = Path("folder")

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.names = {name: Info(tuple(each.shape), str(each.dtype)[6:]) for name, each in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def packed(generator: torch.Generator | None = None, least: int = 100, most: int = 140) -> tuple[Tensor, Tensor]:
    """Random blocks [e, out, i, 16] and scales [e, out, i]."""
    generator = generator or torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (EXPERTS, ROWS, COUNT, BYTES), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(least, most, (EXPERTS, ROWS, COUNT), generator=generator, dtype=torch.uint8)


def settled(tensors: Mapping[str, Tensor], config: Mapping[str, Any] = QUANTISED) -> Any:
    settings = Settings(config, Path("config.json"))
    found = decoded(Held(tensors), settings)
    settings.settle()
    return found


def number(half: int, scale: int) -> float:
    """Four bits by the table of E2M1: sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = half >> 3, half >> 1 & 3, half & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return math.copysign(size * 2.0 ** (scale - 127), -sign if sign else 1)


@pytest.mark.parametrize("scale", [0, 1, 100, 126, 127, 128, 254])
def test_every_byte_is_two_numbers_the_lower_half_first(scale):
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 8, 2, BYTES)
    got = unpacked(bytes_, torch.full((1, 8, 2), scale, dtype=torch.uint8))  # [1, 64, 8]
    expected = [number(half, scale) for byte in range(256) for half in (byte & 15, byte >> 4)]
    wanted = torch.tensor(expected, dtype=torch.float64).view(8, 64).T[None].bfloat16()
    assert got.dtype == torch.bfloat16 and torch.equal(got.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_each_block_has_its_own_scale(expert):
    blocks, scales = packed()
    got = unpacked(blocks, scales)[expert]
    for row, block, byte in itertools.product(range(ROWS), range(COUNT), range(BYTES)):
        pair = int(blocks[expert, row, block, byte])
        scale = int(scales[expert, row, block])
        for half, four in enumerate((pair & 15, pair >> 4)):
            assert float(got[block * 32 + byte * 2 + half, row]) == number(four, scale)


def test_a_scale_of_255_is_no_number():
    blocks, scales = packed()
    scales[1, 2, 1] = 255
    nan = unpacked(blocks, scales).isnan()
    assert nan[1, 32:, 2].all() and nan.sum() == 32


def test_numbers_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is the reference")
    blocks, scales = packed(least=2, most=250)
    expected = theirs.convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(unpacked(blocks, scales).view(torch.int16), expected.contiguous().view(torch.int16))


def test_blocks_and_scales_are_one_tensor_and_all_others_stay():
    blocks, scales = packed()
    bias = torch.ones(EXPERTS, ROWS)
    found = settled({"down_proj_blocks": blocks, "down_proj_scales": scales, "down_proj_bias": bias})
    assert found.names == {
        "down_proj": Info((EXPERTS, COUNT * 32, ROWS), "bfloat16"),
        "down_proj_bias": Info((EXPERTS, ROWS), "float32"),
    }
    assert torch.equal(found.read("down_proj"), unpacked(blocks, scales)) and found.read("down_proj_bias") is bias


def test_a_model_that_is_not_quantised_is_read_as_it_is():
    held = Held({"x_blocks": torch.ones(2)})
    assert decoded(held, Settings({}, Path("config.json"))) is held


def test_another_way_of_quantising_is_named():
    with pytest.raises(Problems, match=r"quant_method='gptq' is not supported here, only 'mxfp4'"):
        settled({}, {"quantization_config": {"quant_method": "gptq"}})


def test_every_tensor_that_cannot_be_unpacked_is_named_at_once():
    blocks, scales = packed()
    lacking = {
        "a_blocks": blocks,
        "b_scales": scales,
        "c_blocks": blocks,
        "c_scales": scales[:, :, :1],
        "d_blocks": blocks.int(),
        "d_scales": scales,
        "e_blocks": blocks[..., :8],
        "e_scales": scales,
        "f_blocks": blocks[0],
        "f_scales": scales[0],
    }
    with pytest.raises(Problems) as caught:
        settled(lacking)
    told = str(caught.value)
    for part in (
        "there is a_blocks, and no a_scales",
        "there is b_scales, and no b_blocks",
        "c_scales [3, 5, 1] are not",
        "d_blocks is int32, not uint8",
        "e_blocks [3, 5, 2, 8] and e_scales",
        "f_blocks [5, 2, 16] and f_scales",
    ):
        assert part in told
