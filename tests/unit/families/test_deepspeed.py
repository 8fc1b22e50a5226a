from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardforge.checkpoint.state import table
from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.deepspeed import DeepSpeedSource
from shardforge.families.open import open_source
from shardforge.model.build import build
from shardforge.recipe.provenance import dump, plain
from tests.tiny import tiny
from tests.unit.families.deepspeed_folders import STEP, Whole, numbers, saved, states, universal, zero12

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (7, 6),
    f"{LAYER}self_attn.q_proj.weight": (6, 6),
    f"{LAYER}self_attn.k_proj.weight": (2, 6),
    f"{LAYER}self_attn.v_proj.weight": (2, 6),
    f"{LAYER}self_attn.o_proj.weight": (6, 6),
    f"{LAYER}mlp.gate_proj.weight": (5, 6),
    f"{LAYER}mlp.up_proj.weight": (5, 6),
    f"{LAYER}mlp.down_proj.weight": (6, 5),
    f"{LAYER}input_layernorm.weight": (6,),
    f"{LAYER}post_attention_layernorm.weight": (6,),
    "model.norm.weight": (6,),
    "lm_head.weight": (7, 6),
}
GATE = "blocks.0.ffn.gate.weight"


def described(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return path


def renamed(whole: Whole, change) -> Whole:
    return {change(name): kinds for name, kinds in whole.items()}


@pytest.mark.parametrize("place", [".", "global_step5"])
def test_config_json_is_found_in_the_folder_of_the_step_and_above_it(tmp_path, place):
    whole = numbers(SHAPES)
    folder = zero12(tmp_path / "global_step5", [whole], 2)
    described(tmp_path / place)
    source = DeepSpeedSource(folder)
    assert torch.equal(source.read(GATE), whole[f"{LAYER}mlp.gate_proj.weight"][""])
    assert torch.equal(source.read_moment("exp_avg_sq", GATE), whole[f"{LAYER}mlp.gate_proj.weight"]["exp_avg_sq"])
    assert (source.beside.step, source.beside.length, source.beside.tokens) == (STEP, 64, {"eos_token_id": 2})


def test_a_config_from_elsewhere_is_taken_when_it_is_named(tmp_path):
    folder = zero12(tmp_path / "global_step5", [numbers(SHAPES)], 2)
    (tmp_path / "model").mkdir()
    named = described(tmp_path / "model")
    assert DeepSpeedSource(folder, named).model == DeepSpeedSource(folder, named / "config.json").model
    assert open_source(folder, named).names.keys() == DeepSpeedSource(folder, named).names.keys()


def test_a_folder_that_nothing_describes_says_what_to_do(tmp_path):
    folder = zero12(tmp_path / "global_step5", [numbers(SHAPES)], 2)
    with pytest.raises(CheckpointError, match=r"nothing says what model(.|\n)*--config"):
        DeepSpeedSource(folder)


def test_weights_with_our_names_are_known_by_the_recipe_beside_them(tmp_path):
    recipe = tiny()
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    whole = numbers({name: row["shape"] for name, row in table(build(recipe.model, recipe.objective.build())).items()})
    source = DeepSpeedSource(zero12(tmp_path / "global_step5", [whole], 2))
    assert source.model == plain(recipe.model)
    assert source.names.keys() == whole.keys() and torch.equal(source.read(GATE), whole[GATE][""])


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_what_a_module_was_wrapped_in_does_not_matter(tmp_path, wrapper):
    folder = zero12(tmp_path / "s", [renamed(numbers(SHAPES), lambda name: wrapper + name)], 1)
    assert GATE in DeepSpeedSource(folder, described(tmp_path)).names


def test_the_names_of_another_model_are_refused_with_some_of_them(tmp_path):
    folder = zero12(tmp_path / "s", [renamed(numbers(SHAPES), lambda name: f"net/{name}")], 1)
    with pytest.raises(CheckpointError, match=r"net/model.embed_tokens.weight(.|\n)*--config"):
        DeepSpeedSource(folder, described(tmp_path))


def test_a_config_of_another_size_is_refused_with_both_shapes(tmp_path):
    folder = zero12(tmp_path / "s", [numbers(SHAPES)], 1)
    with pytest.raises(Problems, match=r"gives blocks.0.ffn.gate.weight \[5, 6\], config.json says \[9, 6\]"):
        DeepSpeedSource(folder, described(tmp_path, intermediate_size=9))


def test_the_second_name_of_a_tied_embedding_is_no_weight(tmp_path):
    whole = numbers({name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"})
    copy = {"lm_head.weight": whole["model.embed_tokens.weight"][""].bfloat16()}
    shared = {"lm_head.weight": "model.embed_tokens.weight"}
    folder = zero12(tmp_path / "s", [whole], 2, module=copy, shared_params=shared)
    assert "head.weight" not in DeepSpeedSource(folder, described(tmp_path, tie_word_embeddings=True)).names


def test_a_head_that_the_config_calls_tied_and_that_is_not_is_refused(tmp_path):
    folder = zero12(tmp_path / "s", [numbers(SHAPES)], 2)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs"):
        DeepSpeedSource(folder, described(tmp_path, tie_word_embeddings=True))


@pytest.mark.parametrize("step, taken", [(STEP, True), (STEP - 1, False)])
def test_our_position_counts_at_the_step_at_which_it_was_written(tmp_path, step, taken):
    whole = numbers(SHAPES)
    model = DeepSpeedSource(zero12(tmp_path / "s", [whole], 2), described(tmp_path)).model
    note = {"step": step, "model": model, "recipe": {"seed": 1}, "extra": {"data": 3}}
    source = DeepSpeedSource(universal(tmp_path / "u", whole, shardforge=note))
    assert (source.beside.extra == {"data": 3}) == taken and (source.beside.recipe == {"seed": 1}) == taken
    assert any(f"at step {step}, this is step {STEP}" in line for line in source.beside.unread) != taken


def test_what_a_training_script_kept_is_named(tmp_path):
    folder = zero12(tmp_path / "s", [numbers(SHAPES)], 2, epoch=3, lr_scheduler={"last_batch_iteration": 4})
    unread = DeepSpeedSource(folder, described(tmp_path)).beside.unread
    assert [line.split(":")[0] for line in unread] == ["epoch", "lr_scheduler"]


def test_moments_of_a_frozen_weight_are_refused(tmp_path):
    whole = numbers(SHAPES)
    frozen = {"lm_head.weight": whole.pop("lm_head.weight")[""]}
    folder = zero12(tmp_path / "s", [whole], 2)
    saved(folder / "mp_rank_00_model_states.pt", states([whole], module=frozen))
    source = DeepSpeedSource(folder, described(tmp_path))
    with pytest.raises(CheckpointError, match=r"no exp_avg of lm_head.weight"):
        source.read_moment("exp_avg", "head.weight")


def test_published_weights_beside_the_partitions_come_first(tmp_path):
    zero12(tmp_path / "global_step5", [numbers(SHAPES)], 2)
    (tmp_path / "latest").write_text("global_step5")
    described(tmp_path)
    assert isinstance(open_source(tmp_path), DeepSpeedSource)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Problems, match="safetensors"):
        open_source(tmp_path)
