from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.errors import Problems, RecipeError
from shardforge.model.build import build
from shardforge.model.context import BuildContext
from shardforge.model.mixers.mla import MLA
from shardforge.nn.init import fill
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import from_mapping
from tests.tiny import GQA, HIDDEN, LENGTH, mapping, tiny

N, R, D, TURNING, V = 4, 6, 3, 2, 5
TINY = {
    "kind": "mla",
    "heads": N,
    "kv_lora_rank": R,
    "qk_nope_head_dim": D,
    "qk_rope_head_dim": TURNING,
    "v_head_dim": V,
}
QUERIES = [None, 7]
YARN = {"kind": "yarn", "factor": 8.0, "original_length": 8, "mscale": 0.7, "mscale_all_dim": 1.0}
POSITIONS = {
    "rope": "rope",
    "nope": "nope",
    "yarn": {"kind": "rope", "layout": "interleaved", "base": 10.0, "scaling": YARN},
}


def mixer(core: str = "eager", **changes: Any) -> Module:
    recipe = tiny(mixer=TINY | changes, model={"core": core})
    ctx = BuildContext(Dim("hidden", HIDDEN), Dim("vocab", 8), 1, recipe.model.init, recipe.model.core)
    made = recipe.model.blocks["one"].mixer.build(ctx).double()
    fill(made, 1)
    return made


def sequence(shift: int = 0, key: Tensor | None = None) -> Sequence:
    positions = torch.arange(LENGTH)[None] + shift
    rows = torch.zeros(1, dtype=torch.int64)
    return Sequence(positions, torch.zeros_like(positions), rows, key, dtype=torch.float64)


def run(made: Module, seq: Sequence | None = None) -> Tensor:
    seq = seq or sequence()
    for module in made.modules():
        if prepare := getattr(module, "prepare", None):
            prepare(seq)
    return made(numbers(), seq)


def numbers() -> Tensor:
    return torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def over_latents(made: MLA, scale: float) -> Tensor:
    """Attention over the latents themselves: W_UK goes into the query, W_UV behind the weighted sum; head by head."""
    x, seq = numbers()[0], sequence()
    made.position.prepare(seq)

    def turned(part: Tensor) -> Tensor:
        return made.position(part[None, :, None], seq)[0, :, 0]

    queries = made.q(x if made.q_down is None else made.q_norm(made.q_down(x))).unflatten(-1, (N, -1))
    latent, key = made.kv_down(x).split([R, TURNING], -1)
    latent, key = made.kv_norm(latent), turned(key)
    up = made.kv_up.weight.unflatten(0, (N, D + V))
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    heads = []
    for n in range(N):
        plain, turning = queries[:, n].split([D, TURNING], -1)
        score = (plain @ up[n, :D]) @ latent.T + turned(turning) @ key.T
        weight = (score * scale).masked_fill(hidden, -math.inf).softmax(-1)
        heads.append((weight @ latent) @ up[n, D:].T)
    return made.out(torch.cat(heads, -1))[None]


@pytest.mark.parametrize("rank", QUERIES)
def test_it_equals_attention_over_the_latents_with_absorbed_projections(rank):
    made = mixer(q_lora_rank=rank)
    torch.testing.assert_close(run(made), over_latents(made, 1 / math.sqrt(D + TURNING)), rtol=1e-12, atol=1e-12)


def test_the_scale_replaces_one_over_the_root_of_both_parts():
    made = mixer(scale=0.3)
    torch.testing.assert_close(run(made), over_latents(made, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("rank", QUERIES)
@pytest.mark.parametrize("core", ["eager", "sdpa"])
def test_absorbed_evaluation_is_the_expanded_form(core, rank, position):
    given = {"q_lora_rank": rank, "position": position, "qk_rope_head_dim": 4, "core": core}
    expanded, absorbed = mixer(**given), mixer(evaluation="absorbed", **given)
    torch.testing.assert_close(run(absorbed), run(expanded), rtol=1e-12, atol=1e-12)


def test_absorbed_evaluation_keeps_documents_apart():
    seq = sequence()
    seq.documents[:, 5:] = 1
    torch.testing.assert_close(run(mixer(evaluation="absorbed"), seq), run(mixer(), seq), rtol=1e-12, atol=1e-12)


def test_absorbed_evaluation_attends_over_one_head_of_latents(monkeypatch):
    made, shapes = mixer(evaluation="absorbed"), []
    plain = made.core.forward
    monkeypatch.setattr(made.core, "forward", lambda *x: shapes.append([t.shape[2:] for t in x[:3]]) or plain(*x))
    run(made)
    assert shapes == [[(N, R + TURNING), (1, R + TURNING), (1, R)]]


WIDE = {"kv_lora_rank": 252, "qk_rope_head_dim": 6, "evaluation": "absorbed"}


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for the package, which is not asked for more channels than it takes: those of each call."""
    package, asked = ModuleType("flash_attn"), []
    package.flash_attn_varlen_func = lambda q, k, v, *runs, **options: asked.append(q.shape[-1]) or v
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return asked


def test_absorbed_heads_that_flash_attn_cannot_take_are_computed_by_another_core(flash_attn):
    made = mixer("flash", **WIDE)
    torch.testing.assert_close(run(made), run(mixer(**WIDE)), rtol=1e-12, atol=1e-12)
    assert flash_attn == []


def test_heads_that_flash_attn_cannot_take_leave_training_to_it(flash_attn):
    run(mixer("flash", **WIDE), sequence(key=torch.tensor(3)))
    assert flash_attn == [D + 6]


@pytest.mark.parametrize(("rank", "asked"), [(250, [256]), (251, [])])
def test_flash_attn_takes_absorbed_heads_of_up_to_256_channels(flash_attn, rank, asked):
    run(mixer("flash", **WIDE | {"kv_lora_rank": rank}))
    assert flash_attn == asked


@pytest.mark.parametrize(("step", "masks"), [(torch.tensor(3), 0), (None, 1)])
def test_training_makes_no_mask_for_the_core_of_wide_heads(flash_attn, step, masks):
    recipe = tiny(mixer=TINY | WIDE, model={"core": "flash"})
    model = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    fill(model, 1)
    seq = sequence(key=step)
    model(torch.zeros(1, LENGTH, dtype=torch.int64), seq)
    assert sum(isinstance(name, tuple) and name[0] == "added" for name in seq.tables) == masks


def test_training_is_expanded_whatever_evaluation_is():
    key = torch.tensor(3)
    assert torch.equal(run(mixer(evaluation="absorbed"), sequence(key=key)), run(mixer(), sequence(key=key)))


@torch.no_grad()
def test_interleaved_channels_are_half_ones_with_the_rows_of_queries_and_keys_reordered():
    half = mixer(qk_rope_head_dim=4)
    other = mixer(qk_rope_head_dim=4, position={"kind": "rope", "layout": "interleaved"})
    order = [0, 2, 1, 3]  # where the channels of (0, 1), (2, 3) stand as (0, 2), (1, 3)
    queries = half.q.weight.unflatten(0, (N, D + 4)).clone()
    queries[:, D:] = queries[:, D:][:, order]
    other.q.weight.copy_(queries.flatten(0, 1))
    other.kv_down.weight[R:] = half.kv_down.weight[R:][order]
    torch.testing.assert_close(run(other), run(half), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", QUERIES)
def test_weights_are_those_of_the_paper(rank):
    made = mixer(q_lora_rank=rank)
    queries = {"q.weight": (N * (D + TURNING), rank or HIDDEN)}
    if rank is not None:
        queries |= {"q_down.weight": (rank, HIDDEN), "q_norm.weight": (rank,)}
    assert {name: tuple(weight.shape) for name, weight in made.named_parameters()} == queries | {
        "kv_down.weight": (R + TURNING, HIDDEN),
        "kv_norm.weight": (R,),
        "kv_up.weight": (N * (D + V), R),
        "out.weight": (HIDDEN, N * V),
    }


def test_only_distances_between_positions_count():
    made = mixer()
    torch.testing.assert_close(run(made, sequence(5)), run(made), rtol=1e-10, atol=1e-10)


def test_the_shared_part_of_the_keys_carries_the_position():
    assert not torch.allclose(run(mixer()), run(mixer(position="nope")))


@torch.no_grad()
def test_without_shared_keys_and_with_whole_latents_it_is_attention_with_a_head_each():
    """The projections of both layers together are those of plain attention; the shared channels are zero in keys."""
    latent = mixer(kv_lora_rank=HIDDEN, norm="none", position="nope", scale=0.4, v_head_dim=D)
    plain = tiny(mixer=GQA | {"head_dim": D, "position": "nope", "scale": 0.4}).model.blocks["one"].mixer
    recipe = tiny(model={"core": "eager"})
    ctx = BuildContext(Dim("hidden", HIDDEN), Dim("vocab", 8), 1, recipe.model.init, recipe.model.core)
    plain = plain.build(ctx).double()
    latent.kv_down.weight[HIDDEN:] = 0
    keys, values = (latent.kv_up.weight @ latent.kv_down.weight[:HIDDEN]).unflatten(0, (N, 2, D)).unbind(1)
    plain.q.weight.copy_(latent.q.weight.unflatten(0, (N, -1))[:, :D].flatten(0, 1))
    plain.k.weight.copy_(keys.flatten(0, 1))
    plain.v.weight.copy_(values.flatten(0, 1))
    plain.out.weight.copy_(latent.out.weight)
    torch.testing.assert_close(run(latent), run(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("evaluation", ["expanded", "absorbed"])
def test_floating_point_operations_count_both_parts_of_the_score_and_the_values(evaluation):
    assert mixer(evaluation=evaluation).core_flops(10) == 2 * 10 * N * (D + TURNING + V)


def test_an_odd_number_of_turning_channels_is_refused():
    with pytest.raises(RecipeError, match=r"3 turning channels, an odd number"):
        mixer(qk_rope_head_dim=3)


def test_a_missing_width_is_named():
    with pytest.raises(Problems, match="kv_lora_rank"):
        from_mapping(mapping(mixer={name: value for name, value in TINY.items() if name != "kv_lora_rank"}))
