from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.model.context import BuildContext
from shardforge.model.embeddings.token import TokenConfig
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from tests.tiny import tiny

IDS = torch.arange(8)[None]
SCALE = 3072**0.5


def embedded(scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(vectors, the table that they come from)."""
    ctx = BuildContext(Dim("hidden", 16), Dim("vocab", 8), 1, tiny().model.init)
    made = TokenConfig(scale=scale).build(ctx)
    fill(made, 1)
    made.to(dtype)
    positions = torch.arange(8)[None]
    x = made(IDS, Sequence(positions, torch.zeros_like(positions), torch.zeros(1, dtype=torch.int64), dtype=dtype))
    return x[0].detach(), made.weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_rows_of_the_table_times_the_scale_in_their_own_type(dtype):
    x, table = embedded(SCALE, dtype)
    assert x.dtype == dtype and torch.equal(x, table * torch.tensor(SCALE, dtype=dtype))


def test_bfloat16_rounds_the_scale_before_it_multiplies():
    x, table = embedded(SCALE, torch.bfloat16)
    assert torch.equal(x, (table.float() * 55.5).bfloat16()) and not torch.equal(x, table * SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_vectors_are_those_of_gemma_bit_for_bit(dtype):
    gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2", reason="transformers is the reference")
    x, table = embedded(SCALE, dtype)
    theirs = gemma2.Gemma2TextScaledWordEmbedding(8, 16, None, embed_scale=SCALE).to(dtype)
    theirs.weight.data = table
    assert torch.equal(theirs(IDS)[0], x)


def test_a_scale_of_one_leaves_the_rows_as_they_are():
    x, table = embedded(1.0, torch.float32)
    assert torch.equal(x, table)
