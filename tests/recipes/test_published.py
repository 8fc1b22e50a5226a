"""Models of recipes/models against the published integers, digit by digit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import pytest

from shardforge.plan.params import Params, params
from shardforge.recipe.load import load_model, shipped

MODELS = shipped() / "models"
OURS = {"llama-7m"}
"""Models that nobody published."""


class Weights(NamedTuple):
    total: int
    active: int
    active_nonembedding: int


PUBLISHED = {
    "gpt2-124m": Weights(124_439_808, 124_439_808, 85_056_000),
    "llama3-8b": Weights(8_030_261_248, 8_030_261_248, 6_979_588_096),
    "llama3-70b": Weights(70_553_706_496, 70_553_706_496, 68_452_360_192),
    "llama3-405b": Weights(405_853_388_800, 405_853_388_800, 401_650_696_192),
    "qwen2.5-72b": Weights(72_706_203_648, 72_706_203_648, 70_214_787_072),
    "olmo2-7b": Weights(7_298_617_344, 7_298_617_344, 6_476_533_760),
    "olmo2-13b": Weights(13_716_198_400, 13_716_198_400, 12_688_593_920),
    "llm-jp-152m": Weights(152_318_464, 152_318_464, 50_344_448),
    "llm-jp-1.5b": Weights(1_558_284_288, 1_558_284_288, 1_359_054_848),
    "llm-jp-3-1.8b": Weights(1_867_614_208, 1_867_614_208, 1_459_718_144),
    "llm-jp-3-3.7b": Weights(3_782_913_024, 3_782_913_024, 3_171_068_928),
    "llm-jp-3-13b": Weights(13_707_924_480, 13_707_924_480, 12_688_184_320),
    "llm-jp-3-172b": Weights(172_400_848_896, 172_400_848_896, 169_947_181_056),
    "deepseek-v3": Weights(671_026_404_352, 37_552_282_624, 35_698_924_544),
    "deepseek-v2": Weights(235_741_434_880, 21_375_800_320, 20_327_224_320),
    "deepseek-v2-lite": Weights(15_706_484_224, 2_661_150_208, 2_241_719_808),
    "moonlight-16b-a3b": Weights(15_960_108_544, 2_914_774_528, 2_243_685_888),
    "mixtral-8x7b": Weights(46_702_792_704, 12_879_925_248, 12_617_781_248),
    "mixtral-8x22b-v0.1": Weights(140_620_634_112, 39_152_031_744, 38_758_815_744),
    "mixtral-8x22b-v0.3": Weights(140_630_071_296, 39_161_468_928, 38_758_815_744),
    "qwen3-30b-a3b": Weights(30_532_122_624, 3_353_032_704, 2_730_702_848),
    "qwen3-235b-a22b": Weights(235_093_634_560, 22_190_763_520, 20_946_103_808),
    "gemma2-2b": Weights(2_614_341_888, 2_614_341_888, 2_024_517_888),
    "gemma2-9b": Weights(9_241_705_984, 9_241_705_984, 8_324_201_984),
    "gemma2-27b": Weights(27_227_128_320, 27_227_128_320, 26_047_480_320),
    "gemma3-1b": Weights(999_885_952, 999_885_952, 697_896_064),
    "gpt-oss-20b": Weights(20_914_757_184, 4_187_440_704, 3_029_173_824),
    "gpt-oss-120b": Weights(116_829_156_672, 5_711_982_912, 4_553_716_032),
    "drop-upcycling-8x152m": Weights(416_608_768, 190_116_352, 88_142_336),
    "drop-upcycling-8x1.5b": Weights(8_957_429_760, 2_615_642_112, 2_416_412_672),
    "drop-upcycling-8x3.7b": Weights(18_581_105_664, 5_897_530_368, 5_285_686_272),
    "llm-jp-3-8x1.8b": Weights(9_266_759_680, 2_924_972_032, 2_517_075_968),
    "llm-jp-3-8x13b": Weights(73_163_822_080, 22_203_028_480, 21_183_288_320),
}

WORK = {  # GFLOP a token of 4096, training, causal; without routers in the first two rows, with them in the others
    "deepseek-v3": 249.82,
    "deepseek-v2": 155.02,
    "qwen2.5-72b": 444.87,
    "llama3-405b": 2473.25,
    "llama3-70b": 433.12,
    "llama3-8b": 48.25,
    "olmo2-7b": 44.55,
    "mixtral-8x7b": 79.71,
    "mixtral-8x22b-v0.1": 242.22,
    "qwen3-30b-a3b": 23.08,
    "qwen3-235b-a22b": 148.34,
    "deepseek-v2-lite": 16.41,
    "moonlight-16b-a3b": 17.17,
    "drop-upcycling-8x3.7b": 35.66,
    "llm-jp-3-3.7b": 22.98,
    "llm-jp-3-13b": 84.22,
}
ROUTERLESS = {"deepseek-v3", "deepseek-v2"}

CACHE = {  # bytes a token in bf16
    "deepseek-v3": 70_272,
    "deepseek-v2": 69_120,
    "qwen2.5-72b": 327_680,
    "llama3-405b": 516_096,
    "llama3-70b": 327_680,
    "llama3-8b": 131_072,
    "olmo2-7b": 524_288,
    "mixtral-8x7b": 131_072,
    "mixtral-8x22b-v0.1": 229_376,
    "qwen3-30b-a3b": 98_304,
    "qwen3-235b-a22b": 192_512,
    "deepseek-v2-lite": 31_104,
    "moonlight-16b-a3b": 31_104,
    "drop-upcycling-8x3.7b": 344_064,
    "llm-jp-3-3.7b": 344_064,
    "llm-jp-3-13b": 819_200,
}


@functools.cache
def counted(name: str) -> Params:
    return params(load_model(MODELS / f"{name}.yaml").recipe)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_the_published_integers(name: str):
    found = counted(name)
    assert Weights(found.total, found.active, found.active_nonembedding) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_of_the_file_says_the_integers(name: str):
    text = (MODELS / f"{name}.yaml").read_text().replace("\n# ", " ")
    found = PUBLISHED[name]
    assert f"{found.total:,} weights" in text
    assert found.active == found.total or f"{found.active:,} met by a token" in text


@pytest.mark.parametrize("name", WORK)
def test_flops_are_the_published_ones(name: str):
    found = counted(name)
    assert found.seq_len == 4096
    chosen = 0 if name in ROUTERLESS else 6 * found.routers
    assert (found.flops_per_token + chosen) / 1e9 == pytest.approx(WORK[name], rel=1e-3)


@pytest.mark.parametrize(("name", "gflop"), [("deepseek-v3", 250), ("deepseek-v2", 155)])
def test_deepseek_takes_the_work_that_its_reports_say(name: str, gflop: int):
    assert counted(name).flops_per_token / 1e9 == pytest.approx(gflop, rel=2e-3)


@pytest.mark.parametrize("name", CACHE)
def test_a_token_takes_the_published_bytes_of_cache(name: str):
    assert counted(name).kv_bytes_per_token == CACHE[name]


def test_a_second_token_of_deepseek_v3_is_counted_apart():
    found = counted("deepseek-v3")
    assert (found.mtp_total, found.mtp_active) == (11_610_067_968, 688_100_352)


@pytest.mark.parametrize(("name", "numbers"), [("deepseek-v3", 14_848), ("moonlight-16b-a3b", 1_664), ("llama3-8b", 0)])
def test_selection_biases_are_no_weights(name: str, numbers: int):
    assert counted(name).buffers == numbers


def test_every_model_has_its_published_integers_here():
    assert {file.stem for file in MODELS.glob("*.yaml")} == PUBLISHED.keys() | OURS


@pytest.mark.parametrize(
    ("name", "ffn"),
    [
        ("qwen3-30b-a3b", {"weights": "renormalized", "score": "softmax", "scale": 1.0}),
        ("qwen3-235b-a22b", {"weights": "renormalized", "score": "softmax", "scale": 1.0}),
        ("mixtral-8x7b", {"weights": "renormalized", "score": "softmax", "scale": 1.0}),
        ("deepseek-v2-lite", {"weights": "raw", "score": "softmax", "scale": 1.0, "groups": None}),
        ("deepseek-v2", {"weights": "raw", "scale": 16.0, "groups": 8, "group_topk": 3, "group_score": "max"}),
        ("deepseek-v3", {"score": "sigmoid", "scale": 2.5, "groups": 8, "group_topk": 4, "group_score": "top_sum"}),
        ("moonlight-16b-a3b", {"score": "sigmoid", "scale": 2.446, "groups": None, "weights": "renormalized"}),
        ("gpt-oss-20b", {"order": "topk_first", "bias": True}),
    ],
)
def test_routers_are_the_released_ones(name: str, ffn: dict):
    blocks = load_model(MODELS / f"{name}.yaml").recipe.model.blocks
    router = next(block.ffn.router for block in blocks.values() if hasattr(block.ffn, "router"))
    assert {key: getattr(router, key) for key in ffn} == ffn


def test_deepseek_v3_starts_with_the_deviation_of_its_report():
    assert load_model(MODELS / "deepseek-v3.yaml").recipe.model.init.std == 0.006


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_windows_and_whole_sequences_alternate_in_gpt_oss_from_a_window_on(name: str):
    model = load_model(MODELS / f"{name}.yaml").recipe.model
    windows = [model.blocks[layer].mixer.mask.window for layer in model.layers]
    assert windows == [128, None] * (len(windows) // 2)


def test_published_tables_name_shipped_models():
    assert {*WORK, *CACHE} <= PUBLISHED.keys()
    assert all(Path(MODELS / f"{name}.yaml").is_file() for name in PUBLISHED)
