from __future__ import annotations

import pytest
import torch

from shardforge.core.dims import Dim
from shardforge.core.errors import Problems, RecipeError
from shardforge.model.context import BuildContext
from shardforge.model.mixers.gqa import GQA, GQAConfig
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import from_mapping
from tests.tiny import GQA as TINY
from tests.tiny import HIDDEN, LENGTH, mapping, tiny


def mixer(**changes: object) -> GQA:
    config = tiny(mixer=TINY | changes).model.blocks["one"].mixer
    recipe = tiny(model={"core": "eager"})
    ctx = BuildContext(Dim("hidden", HIDDEN), Dim("vocab", 8), 1, recipe.model.init, recipe.model.core)
    made = config.build(ctx).double()
    fill(made, 1)
    return made


def run(made: GQA) -> torch.Tensor:
    positions = torch.arange(LENGTH)[None]
    seq = Sequence(positions, torch.zeros_like(positions), torch.zeros(1, dtype=torch.int64), dtype=torch.float64)
    made.core.prepare(seq)
    if hasattr(made.position, "prepare"):
        made.position.prepare(seq)
    x = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return made(x, seq)


def test_query_heads_read_key_heads_in_groups():
    grouped, full = mixer(heads=4, kv_heads=2), mixer(heads=4, kv_heads=4)
    full.load_state_dict(
        {
            name: weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1) if name[0] in "kv" else weight
            for name, weight in grouped.state_dict().items()
        }
    )
    torch.testing.assert_close(run(grouped), run(full), rtol=1e-12, atol=1e-12)


def test_without_kv_heads_there_are_as_many_as_query_heads():
    assert mixer(kv_heads=None).k.weight.shape == (16, HIDDEN)


@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
def test_biases_are_where_the_recipe_says(bias):
    having = {name for name, _ in mixer(bias=bias).named_parameters() if name.endswith("bias")}
    wanted = {"none": "", "qkv": "q k v", "all": "q k v out"}[bias]
    assert having == {f"{name}.bias" for name in wanted.split()}


@pytest.mark.parametrize(("over", "size"), [("head", 4), ("all", 16)])
def test_qk_norm_is_over_a_head_or_over_all(over, size):
    made = mixer(qk_norm="rmsnorm", qk_norm_over=over)
    assert made.q_norm.weight.shape == made.k_norm.weight.shape == (size,)


def test_the_scale_replaces_one_over_the_root_of_the_head():
    assert (mixer().core.scale, mixer(scale=0.125).core.scale) == (0.5, 0.125)


def test_heads_that_are_no_multiple_of_kv_heads_are_refused_with_the_nearest_that_is():
    with pytest.raises(RecipeError, match=r"heads=6 is no multiple of kv_heads=4(.|\n)*kv_heads: 3"):
        GQAConfig(heads=6, kv_heads=4, head_dim=2)


def test_the_recipe_says_where_the_wrong_heads_stand():
    with pytest.raises(Problems, match="heads=4 is no multiple of kv_heads=3"):
        from_mapping(mapping(mixer=TINY | {"kv_heads": 3}))
