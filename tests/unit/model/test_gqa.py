from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardforge.core.dims import Dim
from shardforge.core.errors import Problems, RecipeError
from shardforge.model.context import BuildContext
from shardforge.model.mixers.gqa import GQA, GQAConfig
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import from_mapping
from tests.tiny import GQA as TINY
from tests.tiny import HIDDEN, LENGTH, mapping, tiny


def mixer(core: str = "eager", **changes: object) -> GQA:
    config = tiny(mixer=TINY | changes).model.blocks["one"].mixer
    recipe = tiny(model={"core": core})
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


def test_each_query_head_has_one_sink_which_starts_at_zero():
    sinks = mixer(heads=8, kv_heads=2, sinks="learned").sinks
    assert sinks.shape == (8,) and sinks.eq(0).all()


def test_without_sinks_there_is_no_weight_of_them():
    assert "sinks" not in mixer().state_dict()


def test_a_sink_of_zero_is_one_more_key_of_score_zero_and_value_zero():
    made, plain = mixer(sinks="learned"), mixer()
    for each in (made, plain):
        for name in ("q", "k"):
            nn.init.zeros_(each.get_submodule(name).weight)
    counts = torch.arange(1, LENGTH + 1, dtype=torch.float64)[:, None]
    torch.testing.assert_close(run(made), run(plain) * counts / (counts + 1), rtol=1e-12, atol=1e-12)


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


ROPE = {"kind": "rope", "base": 10000.0}


def published(layer: int) -> tuple[nn.Module, nn.Module]:
    """(their attention, its rotary tables): layer 0 has a window of 5, layer 1 sees all before it."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(
        hidden_size=HIDDEN,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=5,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    theirs = gpt_oss.GptOssAttention(config, layer).double()
    generator = torch.Generator().manual_seed(layer)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.5, generator=generator)
    return theirs, gpt_oss.GptOssRotaryEmbedding(config).double()


def theirs_on(attention: nn.Module, rotary: nn.Module, x: Tensor, window: int | None) -> Tensor:
    place = torch.arange(LENGTH)
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= (window or LENGTH))
    mask = torch.zeros(LENGTH, LENGTH, dtype=x.dtype).masked_fill(hidden, float("-inf"))
    return attention(x, rotary(x, place[None]), mask[None, None])[0]


@pytest.mark.parametrize("core", ["eager", "sdpa"])
@pytest.mark.parametrize(("layer", "window"), [(0, 5), (1, None)])
def test_sinks_are_those_of_gpt_oss_with_every_gradient(core, layer, window):
    theirs, rotary = published(layer)
    mask = "causal" if window is None else {"kind": "window", "size": window}
    ours = mixer(core, heads=8, kv_heads=2, bias="all", sinks="learned", position=ROPE, mask=mask)
    ours.load_state_dict({renamed(name): weight.detach().clone() for name, weight in theirs.named_parameters()})
    x = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got, expected = run(ours), theirs_on(theirs, rotary, x, window)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # their rotary tables are float32
    for y in (got, expected):
        y.square().sum().backward()
    grads = {renamed(name): weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        assert (weight.grad - grads[name]).norm() < 1e-6 * grads[name].norm().clamp(min=1.0), name


def renamed(name: str) -> str:
    return name.replace("o_proj", "out").replace("_proj", "")
