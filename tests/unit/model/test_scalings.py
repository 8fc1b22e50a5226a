from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.errors import Problems, RecipeError
from shardforge.core.slots import rope_scalings
from shardforge.model.context import BuildContext
from shardforge.model.positions.rope import RopeConfig
from shardforge.model.scaling import frequencies
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import from_mapping
from tests.tiny import GQA, mapping, tiny

BASE, WIDTH, L, S = 10000.0, 128, 4096, 8.0
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ntk": {},
    "dynamic": {"original_length": L},
    "llama3": {"original_length": L},
    "yarn": {"original_length": L},
    "yarn-untruncated": {"original_length": L, "truncate": False},
    "yarn-rotation": {"original_length": L, "ramp": "rotation"},
    "yarn-deepseek": {"original_length": L, "mscale": 0.707, "mscale_all_dim": 1.0},
}


def made(case: str, factor: float = S, **changes: Any) -> Any:
    return rope_scalings[case.split("-")[0]](**KINDS[case] | {"factor": factor} | changes)


def rates(case: str, factor: float = S, length: int = L, **changes: Any) -> list[float]:
    return made(case, factor, **changes).rates(BASE, WIDTH, length).tolist()


def plain() -> list[float]:
    return [BASE ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]


@pytest.mark.parametrize("case", KINDS)
def test_a_factor_of_1_is_no_scaling(case):
    scaling = made(case, 1.0)
    assert rates(case, 1.0) == pytest.approx(plain(), rel=1e-14)
    assert scaling.amplitude == 1.0 and scaling.score_scale == 1.0


@pytest.mark.parametrize("case", [case for case in KINDS if case not in ("linear", "dynamic")])
def test_the_fastest_pair_stays_and_the_slowest_turns_slower_by_the_factor(case):
    got = rates(case)
    assert got[0] == pytest.approx(1.0, rel=1e-14)
    assert got[-1] == pytest.approx(plain()[-1] / S, rel=1e-12)


@pytest.mark.parametrize("case", KINDS)
def test_slower_pairs_stay_slower(case):
    got = rates(case, length=4 * L)
    assert got == sorted(got, reverse=True)


def test_linear_slows_every_pair_by_the_factor():
    assert rates("linear") == pytest.approx([rate / S for rate in plain()], rel=1e-14)


@pytest.mark.parametrize("length", [1, L // 2, L])
def test_dynamic_changes_nothing_up_to_the_original_length(length):
    assert rates("dynamic", length=length) == pytest.approx(plain(), rel=1e-14)


@pytest.mark.parametrize("times", [1.5, 2, 8])
def test_beyond_it_the_slowest_pair_takes_what_the_length_asks_for(times):
    got = rates("dynamic", length=int(times * L))
    assert got[0] == 1.0
    assert got[-1] == pytest.approx(plain()[-1] / (S * times - (S - 1)), rel=1e-12)


def test_dynamic_reads_the_length_of_the_whole_sequence_and_not_of_the_part_that_is_here():
    scaling = made("dynamic", original_length=8)
    rope = RopeConfig(scaling=scaling).build(WIDTH)
    here = torch.arange(4)[None]
    seq = Sequence(here, torch.zeros_like(here), torch.zeros(1), dtype=torch.float64, length=64)
    expected = here[:, :, None, None] * scaling.rates(BASE, WIDTH, 64)
    torch.testing.assert_close(rope.table(seq)[1], expected.sin(), rtol=0, atol=0)


def test_llama3_blends_by_wavelength_as_the_released_code_does():
    expected = []
    for rate in plain():
        wavelength = 2 * math.pi / rate
        blend = (L / wavelength - 1) / (4 - 1)
        medium = (1 - blend) * rate / S + blend * rate
        expected.append(rate if wavelength < L / 4 else rate / S if wavelength > L else medium)
    assert rates("llama3") == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("length", "beta_fast"), [(L, 32.0), (256, 32.0), (L, 3.0)])
def test_yarn_ramps_over_channels_between_two_numbers_of_turns(truncate, length, beta_fast):
    def channel(turns: float) -> float:
        return WIDTH * math.log(length / (2 * math.pi * turns)) / (2 * math.log(BASE))

    low, high = channel(beta_fast), channel(1.0)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, WIDTH - 1)
    ramp = [min(1.0, max(0.0, (i - low) / (high - low))) for i in range(WIDTH // 2)]
    expected = [r * rate / S + (1 - r) * rate for r, rate in zip(ramp, plain(), strict=True)]
    got = rates("yarn", original_length=length, truncate=truncate, beta_fast=beta_fast)
    assert got == pytest.approx(expected, rel=1e-13)


def test_the_ramp_over_turns_is_the_prose_of_the_paper():
    expected = []
    for rate in plain():
        kept = min(1.0, max(0.0, (L * rate / (2 * math.pi) - 1) / 31))
        expected.append((1 - kept) * rate / S + kept * rate)
    assert rates("yarn-rotation") == pytest.approx(expected, rel=1e-13)


def test_the_two_ramps_are_up_to_four_times_apart():
    pairs = zip(rates("yarn", 32.0), rates("yarn-rotation", 32.0), strict=True)
    assert max(ours / paper for ours, paper in pairs) == pytest.approx(3.96, abs=0.01)


def test_a_ramp_without_a_length_is_a_step():
    got = rates("yarn", original_length=3)
    assert got[0] == 1.0
    assert got[1:] == pytest.approx([rate / S for rate in plain()[1:]], rel=1e-13)


def test_yarn_multiplies_cos_and_sin_by_a_tenth_of_the_log_of_the_factor():
    scaling = made("yarn", 32.0)
    assert scaling.amplitude == pytest.approx(0.1 * math.log(32) + 1) and scaling.score_scale == 1.0


def test_a_given_attention_factor_replaces_that():
    assert made("yarn", attention_factor=1.25).amplitude == 1.25


@pytest.mark.parametrize(("mscale", "every"), [(1.0, 1.0), (0.707, 1.0), (1.0, 0.0)])
def test_deepseek_divides_the_part_of_all_channels_out_of_cos_and_sin(mscale, every):
    def m(x: float) -> float:
        return 0.1 * x * math.log(40) + 1

    scaling = made("yarn", 40.0, mscale=mscale, mscale_all_dim=every)
    assert scaling.amplitude == pytest.approx(m(mscale) / m(every))
    assert scaling.score_scale == pytest.approx(m(every) ** 2)


def turned(scaling: Any, x: Tensor, fraction: float) -> Tensor:
    rope = RopeConfig(fraction=fraction, scaling=scaling).build(x.shape[-1])
    places = torch.full((1, x.shape[1]), 3)
    seq = Sequence(places, torch.zeros_like(places), torch.zeros(1), dtype=torch.float64)
    rope.prepare(seq)
    return rope(x, seq)


def test_the_attention_factor_is_squared_in_the_scores_of_turning_channels_alone():
    q = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = turned(made("yarn"), q, 0.5)
    gain = (0.1 * math.log(S) + 1) ** 2
    torch.testing.assert_close(y[..., :4].square().sum(-1), gain * q[..., :4].square().sum(-1))
    assert torch.equal(y[..., 4:], q[..., 4:])


@pytest.mark.parametrize("mixer", [GQA, {"kind": "mla", "heads": 4, "kv_lora_rank": 6}])
def test_deepseeks_factor_is_in_the_scale_of_all_scores(mixer):
    if mixer["kind"] == "mla":
        mixer = mixer | {"qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5}
    scaling = {"kind": "yarn", "factor": 40.0, "original_length": 64, "mscale": 1.0, "mscale_all_dim": 1.0}

    def scale(position: dict[str, Any]) -> float:
        model = tiny(mixer=mixer | {"position": position, "scale": 0.5}).model
        ctx = BuildContext(Dim("hidden", 16), Dim("vocab", 8), 1, model.init, model.core)
        return model.blocks["one"].mixer.build(ctx).core.scale

    gain = (0.1 * math.log(40) + 1) ** 2
    assert scale({"kind": "rope", "scaling": scaling}) == pytest.approx(0.5 * gain)
    assert scale({"kind": "rope"}) == scale({"kind": "nope"}) == 0.5


@pytest.mark.parametrize("kind", ["ntk", "dynamic"])
def test_a_stretched_base_needs_a_second_pair(kind):
    with pytest.raises(RecipeError, match=r"2 turning channels are one pair(.|\n)*kind: linear"):
        RopeConfig(scaling=made(kind)).build(2)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "yarn", "beta_slow": 40.0}, r"beta_slow=40.0 is not below beta_fast=32.0"),
        ({"kind": "yarn", "mscale": 1.0}, r"mscale=1.0 and mscale_all_dim=None: one of them alone"),
        ({"kind": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.1}, r"both set the factor"),
        ({"kind": "yarn", "ramp": "rotation", "truncate": False}, r"truncate: false says how the ramp"),
        ({"kind": "llama3", "low_freq_factor": 5.0}, r"low_freq_factor=5.0 is not below high_freq_factor=4.0"),
        ({"kind": "linear", "factor": 0.5}, r"0.5 is not at least 1"),
    ],
)
def test_a_scaling_that_means_nothing_is_refused_where_it_stands(scaling, message):
    given = {"factor": 4.0} | ({} if scaling["kind"] == "linear" else {"original_length": 64}) | scaling
    with pytest.raises(Problems, match=rf"scaling(.|\n)*{message}"):
        from_mapping(mapping(mixer=GQA | {"position": {"kind": "rope", "scaling": given}}))


def test_all_mistakes_of_a_yarn_are_told_at_once():
    with pytest.raises(Problems, match=r"2 problems in a yarn scaling"):
        made("yarn", beta_slow=40.0, mscale=1.0)


def test_rates_are_float64_whatever_the_default_is():
    assert frequencies(BASE, WIDTH).dtype == torch.float64
    assert all(made(case).rates(BASE, WIDTH, 2 * L).dtype == torch.float64 for case in KINDS)
