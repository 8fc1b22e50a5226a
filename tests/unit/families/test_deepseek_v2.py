"""DeepSeek-V2: its loss for even use, and rotary channels that turn other ones than ours."""

from __future__ import annotations

import pytest
import torch

from shardforge.families.huggingface import HuggingFaceSource
from shardforge.families.publish import publish
from shardforge.nn.sequence import Sequence
from tests.tiny_deepseek import SOFTMAX, decoder, released, section, weights, written

BALANCED = {"aux_loss_alpha": 0.02}


@pytest.fixture
def sequence() -> tuple[torch.Tensor, Sequence]:
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    place = torch.arange(9).expand(2, -1)
    return tokens, Sequence(place, torch.zeros_like(place), torch.arange(2))


def test_a_model_whose_channels_turn_in_halves_is_written_as_the_same_function(tmp_path, sequence):
    model = section(SOFTMAX, layout="half")
    ours = weights(model)
    source = HuggingFaceSource(written(tmp_path, *released(model, ours)))
    with torch.no_grad():
        before = decoder(model, ours)(*sequence)
        after = decoder(source.model, {name: source.read(name) for name in source.names})(*sequence)
    assert torch.allclose(before, after, rtol=0, atol=1e-4 * before.abs().max().item())


def test_what_is_written_of_halves_turns_neighbours(tmp_path):
    model = section(SOFTMAX, layout="half")
    source = HuggingFaceSource(written(tmp_path, *released(model, weights(model))))
    layouts = {block["mixer"]["position"]["layout"] for block in source.model["blocks"].values()}
    assert layouts == {"interleaved"}


def test_only_rows_of_turning_channels_move():
    half, pairs = section(SOFTMAX, layout="half"), section(SOFTMAX)
    ours = weights(half)
    moved, plain = released(half, ours)[1], released(pairs, ours)[1]
    apart = {name for name, each in plain.items() if not torch.equal(each, moved[name])}
    assert {name.split(".", 3)[3] for name in apart} == {
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
    }


@pytest.mark.parametrize(("seq_aux", "scope"), [(True, "sequence"), (False, "batch")])
def test_the_loss_for_even_use_is_read(tmp_path, seq_aux, scope):
    told, tensors = released(section(SOFTMAX), weights(section(SOFTMAX)))
    source = HuggingFaceSource(written(tmp_path, told | BALANCED | {"seq_aux": seq_aux}, tensors))
    (loss,) = source.model["blocks"]["moe"]["ffn"]["balance"]
    assert (loss["scope"], loss["weight"]) == (scope, 0.02)


def test_the_loss_for_even_use_is_written():
    model = section(SOFTMAX)
    model["blocks"]["moe"]["ffn"]["balance"] = [
        {"scope": "sequence", "weight": 0.02, "sequences": 1, "counts": "now"},
    ]
    published = publish(model, "here")
    assert (published.config["aux_loss_alpha"], published.config["seq_aux"], published.left) == (0.02, True, ())
