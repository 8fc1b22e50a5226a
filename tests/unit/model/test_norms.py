from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardforge.core.dims import Dim
from shardforge.model.norms.layernorm import LayerNormConfig
from shardforge.model.norms.none import NoNormConfig
from shardforge.model.norms.rmsnorm import RMSNormConfig
from shardforge.nn.init import fill
from shardforge.nn.module import Module

WIDTH = Dim("heads", 4) * Dim("head_dim", 3)
CONFIGS = [
    RMSNormConfig(),
    RMSNormConfig(offset=1.0, eps=0.1),
    LayerNormConfig(),
    LayerNormConfig(bias=False, eps=0.1),
]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def made(config: object) -> Module:
    """A norm whose weights are not where they started."""
    norm = config.build(WIDTH).double()
    fill(norm, 1)
    for weight in norm.parameters():
        weight.data += draw(12)
    return norm


def test_rmsnorm_is_its_equation():
    norm, x = made(RMSNormConfig(eps=0.1)), draw(2, 5, 12)
    torch.testing.assert_close(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())


def test_layernorm_is_that_of_torch():
    norm, x = made(LayerNormConfig(eps=0.1)), draw(2, 5, 12)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (12,), norm.weight, norm.bias, 0.1))


def test_an_offset_is_added_to_the_stored_gain():
    plain, offset, x = made(RMSNormConfig()), made(RMSNormConfig(offset=1.0)), draw(2, 12)
    offset.weight = nn.Parameter(plain.weight - 1)
    torch.testing.assert_close(offset(x), plain(x))


@pytest.mark.parametrize("config", [*CONFIGS, NoNormConfig()], ids=str)
def test_norms_start_with_gain_1_and_no_bias(config):
    fresh, x = config.build(WIDTH).double(), draw(2, 12)
    fill(fresh, 1)
    gain = config.offset + fresh.weight if getattr(config, "offset", 0) else getattr(fresh, "weight", torch.ones(12))
    assert (gain == 1).all() and (getattr(fresh, "bias", torch.zeros(1)) == 0).all()
    assert fresh(x).shape == x.shape


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_norm_over_split_channels_is_the_norm_over_all(config):
    norm, x = made(config), draw(2, 5, 12)
    expected, halves, weights = norm(x), x.chunk(2, -1), dict(norm.named_parameters())
    got = []
    for part, half in enumerate(halves):
        piece = made(config)
        for name, weight in weights.items():
            setattr(piece, name, nn.Parameter(weight.detach().chunk(2)[part]))
        other, calls = halves[1 - part], []

        def total(local: torch.Tensor, other: torch.Tensor = other, calls: list = calls) -> torch.Tensor:
            """What the other rank adds: its sum first, then its squares around the common mean."""
            calls.append(local)
            if isinstance(config, RMSNormConfig):
                return local + other.square().sum(-1, keepdim=True)
            if len(calls) == 1:
                return local + other.sum(-1, keepdim=True)
            return local + (other - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True)

        piece.total = total
        got.append(piece(half))
    torch.testing.assert_close(torch.cat(got, -1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_statistics_of_bfloat16_are_float32(config):
    norm = made(config).float()
    x = 300 * torch.ones(1, 12) + draw(1, 12).float()
    wide = norm(x.bfloat16().float())
    assert (norm.bfloat16()(x.bfloat16()).float() - wide).abs().max() < 0.02 * wide.abs().max() + 0.02


def test_no_norm_is_no_change():
    x = draw(2, 12)
    assert NoNormConfig().build(WIDTH)(x) is x
