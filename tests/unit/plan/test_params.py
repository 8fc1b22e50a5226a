from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardforge.core.errors import RecipeError
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.plan.params import Params, params, spans, table
from tests.tiny import GLU, GQA, LENGTH, VOCAB, tiny

HIDDEN, LAYERS, EXPERTS, INNER = 16, 2, 6, 24
TABLE = VOCAB * HIDDEN
MIXER = 4 * HIDDEN * HIDDEN
EXPERT = 3 * HIDDEN * INNER
MOE = {"kind": "moe", "experts": EXPERTS, "k": 2, "inner": INNER}
NORMS = 2 * HIDDEN


def of(seq_len: int | None = None, **changes: Any) -> Params:
    return params(tiny(**changes), seq_len)


def test_a_dense_model_meets_all_its_weights():
    found = of()
    block = MIXER + EXPERT + NORMS
    assert found.total == found.active == LAYERS * block + HIDDEN + 2 * TABLE
    assert found.active_nonembedding == LAYERS * block + HIDDEN
    assert (found.embedding, found.head, found.routers, found.buffers) == (TABLE, TABLE, 0, 0)


def test_total_is_what_the_model_declares():
    recipe = tiny(ffn=MOE | {"shared": GLU})
    assert params(recipe).total == sum(item.count for item in declared(build(recipe.model, recipe.objective.build())))


@pytest.mark.parametrize("capacity", [2.0, 2.3])
def test_experts_that_choose_meet_a_token_as_often_as_they_can_and_weights_are_counted_whole(capacity):
    router = {"kind": "expert_choice", "capacity": capacity, "leak": "allowed"}
    found = of(ffn=MOE | {"k": EXPERTS, "router": router})
    assert found.total - found.active == round(LAYERS * (EXPERTS - capacity) * EXPERT)
    numbers = (found.active, found.active_nonembedding, found.mtp_active, found.blocks[0].active)
    assert all(isinstance(number, int) for number in numbers)


def test_a_tied_table_counts_once():
    found, own = of(model={"head": "tied"}), of()
    assert (found.head, found.embedding) == (0, TABLE)
    assert own.total - found.total == TABLE and own.active_nonembedding == found.active_nonembedding


def test_a_head_with_a_cap_counts_as_the_head_inside():
    assert of(model={"head": {"kind": "softcap", "cap": 5.0, "head": "linear"}}).head == TABLE
    assert of(model={"head": {"kind": "softcap", "cap": 5.0, "head": "tied"}}).head == 0


def test_learned_positions_belong_to_the_embedding():
    found = of(model={"embedding": {"kind": "learned", "length": 20}})
    assert found.embedding == TABLE + 20 * HIDDEN
    assert found.active_nonembedding == of().active_nonembedding


def test_of_experts_a_token_meets_the_chosen_ones_and_the_whole_router():
    found = of(ffn=MOE)
    assert found.routers == LAYERS * EXPERTS * HIDDEN
    assert found.total - found.active == LAYERS * (EXPERTS - 2) * EXPERT
    assert found.active_nonembedding == LAYERS * (MIXER + NORMS + 2 * EXPERT + EXPERTS * HIDDEN) + HIDDEN


def test_biases_of_experts_are_met_with_their_experts():
    plain, biased = of(ffn=MOE), of(ffn=MOE | {"bias": True})
    assert biased.total - plain.total == LAYERS * EXPERTS * (2 * INNER + HIDDEN)
    assert biased.active - plain.active == LAYERS * 2 * (2 * INNER + HIDDEN)


def test_a_shared_ffn_is_met_whole():
    plain, shared = of(ffn=MOE), of(ffn=MOE | {"shared": GLU})
    assert shared.total - plain.total == shared.active - plain.active == LAYERS * EXPERT


def test_a_selection_bias_is_a_buffer():
    router = {"kind": "topk", "score": "sigmoid", "selection_bias": {}}
    found = of(ffn=MOE | {"router": router})
    assert found.buffers == LAYERS * EXPERTS and found.total == of(ffn=MOE).total


def test_modules_that_predict_further_tokens_stand_beside_the_rest():
    plain, found = of(ffn=MOE), of(ffn=MOE, model={"mtp": {"block": "one", "depth": 2}})
    assert replace(found, mtp_total=0, mtp_active=0) == plain
    block = MIXER + NORMS + EXPERTS * HIDDEN
    own = 2 * HIDDEN * HIDDEN + 3 * HIDDEN
    assert found.mtp_total == 2 * (block + EXPERTS * EXPERT + own)
    assert found.mtp_active == 2 * (block + 2 * EXPERT + own)


def test_flop_of_a_token_are_those_of_a_step_by_its_tokens():
    recipe = tiny(ffn=MOE)
    made = build(recipe.model, recipe.objective.build())
    assert params(recipe).flops_per_token == flops.step_flops(made, LENGTH) / LENGTH
    assert params(recipe, 64).flops_per_token == flops.step_flops(made, 64) / 64


def test_a_cache_holds_keys_and_values_of_key_value_heads():
    assert of(mixer=GQA).kv_bytes_per_token == 2 * LAYERS * 2 * 4 * 4
    assert of(mixer=GQA | {"kv_heads": 1}).kv_bytes_per_token == 2 * LAYERS * 2 * 4


def test_a_cache_of_latents_holds_them_and_the_shared_part_with_position():
    widths = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
    assert of(mixer={"kind": "mla", "heads": 4, **widths}).kv_bytes_per_token == 2 * LAYERS * (6 + 2)


def test_a_window_keeps_no_more_than_it_sees():
    found = of(mixer=GQA | {"mask": {"kind": "window", "size": 5}})
    assert found.kv_bytes_per_token == of().kv_bytes_per_token
    assert found.kv_bytes_per_sequence == 5 * found.kv_bytes_per_token
    assert of().kv_bytes_per_sequence == LENGTH * found.kv_bytes_per_token


def test_blocks_are_counted_by_the_layer():
    block = {"mixer": GQA, "ffn": GLU}
    blocks = {"near": block, "far": block | {"ffn": MOE}}
    found = of(model={"blocks": blocks, "stack": ["near", "(near far) x 2"]})
    assert [(each.name, each.layers, each.stands) for each in found.blocks] == [("near", 3, "0-1 3"), ("far", 2, "2 4")]
    assert sum(each.layers * each.total for each in found.blocks) + HIDDEN + 2 * TABLE == found.total
    assert sum(each.layers * each.active for each in found.blocks) + HIDDEN + 2 * TABLE == found.active
    assert [each.mixer for each in found.blocks] == [MIXER, MIXER]
    assert [each.ffn for each in found.blocks] == [EXPERT, EXPERTS * (EXPERT + HIDDEN)]


def test_a_model_with_positions_is_counted_within_them():
    learned = {"embedding": {"kind": "learned", "length": 8}}
    assert of(model=learned).seq_len == 8
    with pytest.raises(
        RecipeError, match=r"a sequence of 9 tokens is longer than the 8 positions.*\n    fix: at most 8"
    ):
        of(9, model=learned)


def test_json_has_the_keys_that_are_asked_for():
    keys = {"total", "active", "active_nonembedding", "flops_per_token", "kv_bytes_per_token"}
    assert keys <= of().as_dict().keys()


def test_the_table_leaves_out_what_a_model_does_not_have():
    dense = "\n".join(table(of()))
    sparse = "\n".join(table(of(ffn=MOE, model={"mtp": {"block": "one"}})))
    assert "routers" not in dense and "mtp" not in dense and "buffers" not in dense
    assert "routers" in sparse and "mtp_active" in sparse


@pytest.mark.parametrize(
    ("indices", "text"),
    [([0], "0"), ([0, 1, 2, 5], "0-2 5"), (range(0, 14, 2), "0 2 4 ... 12"), (range(0, 12, 2), "0 2 4 6 8 10")],
)
def test_layers_are_written_as_spans(indices, text: str):
    assert spans(indices) == text
