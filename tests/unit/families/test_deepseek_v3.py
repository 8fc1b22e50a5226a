"""DeepSeek-V3: modules of further tokens, and the copies that its files keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.huggingface import HuggingFaceSource
from shardforge.families.publish import publish
from shardforge.families.section import apart, whole
from tests.tiny_deepseek import MTP, SIGMOID, released, section, weights, written

EMBEDDING = "model.embed_tokens.weight"
COPIES = [f"model.layers.{at}.{copy}" for at in (3, 4) for copy in ("embed_tokens.weight", "shared_head.head.weight")]
GROUPED = SIGMOID | {"groups": 2, "group_topk": 1}


@pytest.fixture(params=["linear", "tied"])
def model(request: pytest.FixtureRequest) -> dict[str, Any]:
    return whole(section(mtp=MTP) | {"head": request.param}, "tiny")


def read(source: HuggingFaceSource) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.names}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


def test_modules_come_back_as_they_were(tmp_path, model):
    ours = weights(model)
    source = HuggingFaceSource(written(tmp_path, *released(model, ours)))
    assert apart(model, source.model) == []
    assert same(read(source), ours)


def test_modules_stand_behind_the_last_layer_with_copies_of_both_tables(model):
    tensors = released(model, weights(model))[1]
    head = tensors.get("lm_head.weight", tensors[EMBEDDING])
    assert all(torch.equal(tensors[name], head if "head" in name else tensors[EMBEDDING]) for name in COPIES)


def test_files_may_spare_the_copies(tmp_path, model):
    ours = weights(model)
    told, tensors = released(model, ours)
    spared = {name: each for name, each in tensors.items() if name not in COPIES}
    assert same(read(HuggingFaceSource(written(tmp_path, told, spared))), ours)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_with_other_numbers_is_an_error_that_names_it(tmp_path, name):
    model = section(mtp=MTP)
    told, tensors = released(model, weights(model))
    tensors[name][0, 0] += 1
    source = HuggingFaceSource(written(tmp_path, told, tensors))
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('.weight')} should be a copy of "):
        source.read("head.weight" if "head" in name else "embed.weight")


def test_copies_of_what_is_no_number_are_copies(tmp_path):
    model = section(mtp=MTP)
    ours = weights(model)
    ours["embed.weight"][0, 0] = torch.nan
    source = HuggingFaceSource(written(tmp_path, *released(model, ours)))
    assert source.read("embed.weight").isnan().sum() == 1


def test_a_copy_of_another_shape_is_an_error_before_anything_is_read(tmp_path):
    model = section(mtp=MTP)
    told, tensors = released(model, weights(model))
    tensors[COPIES[0]] = torch.zeros(3, 12)
    with pytest.raises(Problems, match="nothing that can be cut so"):
        HuggingFaceSource(written(tmp_path, told, tensors))


def without_modules(told: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return told, {
        name: each for name, each in tensors.items() if not name.startswith(("model.layers.3", "model.layers.4"))
    }


def test_modules_of_which_there_is_nothing_are_left_out_and_told(tmp_path):
    model = section(mtp=MTP)
    source = HuggingFaceSource(written(tmp_path, *without_modules(*released(model, weights(model)))))
    assert apart(section(), source.model) == []
    assert source.beside.unread == ("config.json speaks of mtp, of which there are no weights",)


def test_half_a_module_is_an_error(tmp_path):
    model = section(mtp=MTP)
    told, tensors = released(model, weights(model))
    del tensors["model.layers.4.eh_proj.weight"]
    with pytest.raises(
        Problems, match=r"model.layers.4.eh_proj.weight is missing, for mtp.1.project.weight \[12, 24\]"
    ):
        HuggingFaceSource(written(tmp_path, told, tensors))


def test_the_words_of_transformers_5_for_modules_count_too(tmp_path):
    model = section(mtp=MTP)
    told, tensors = released(model, weights(model))
    told["num_mtp_layers"] = told.pop("num_nextn_predict_layers")
    assert HuggingFaceSource(written(tmp_path, told, tensors)).model["mtp"]["depth"] == 2


def test_channels_that_turn_in_halves_are_said_and_not_moved():
    half, pairs = section(layout="half"), section()
    ours = weights(half)
    (told, moved), (_, plain) = released(half, ours), released(pairs, ours)
    assert told["rope_interleave"] is False
    assert same(moved, plain)


def test_all_groups_kept_are_no_groups(tmp_path):
    told, tensors = released(section(), weights(section()))
    source = HuggingFaceSource(written(tmp_path, told | {"n_group": 2, "topk_group": 2}, tensors))
    assert source.model["blocks"]["moe"]["ffn"]["router"]["groups"] is None


def test_groups_are_written_and_read(tmp_path):
    model = section(GROUPED)
    source = HuggingFaceSource(written(tmp_path, *released(model, weights(model))))
    router = source.model["blocks"]["moe"]["ffn"]["router"]
    assert (router["groups"], router["group_topk"], router["group_score"]) == (2, 1, "top_sum")


def test_how_fast_the_selection_bias_moves_is_left_behind_and_told():
    model = section(SIGMOID | {"selection_bias": {"rate": 0.5}})
    assert publish(model, "here").left == ("layers.ffn.router.selection_bias.rate: 0.5 here, 0.001 there",)
