"""A model that is computed part by part computes what the whole model does."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.open import open_source
from shardforge.families.streamed import HEAD, MTP, NORM, Streamed
from shardforge.model.build import build
from shardforge.nn.batch import Batch
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import from_mapping
from shardforge.recipe.provenance import plain
from tests.tiny import HIDDEN, VOCAB, tiny

MLA = {
    "kind": "mla",
    "heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "evaluation": "absorbed",
}
MOE = {"kind": "moe", "experts": 4, "k": 2, "inner": 12, "router": {"kind": "topk", "selection_bias": {}}}
NEXT = {"depth": 2, "block": "one", "weight": 0.3}
MODELS = {
    "dense": {},
    "tied": {"model": {"head": "tied"}},
    "softcap": {"model": {"head": {"kind": "softcap", "cap": 2.0}, "embedding": {"kind": "token", "scale": 4.0}}},
    "softcap untied": {"model": {"head": {"kind": "softcap", "cap": 2.0, "head": "linear"}}},
    "positions": {"model": {"embedding": {"kind": "learned", "length": 16}}},
    "latent": {"mixer": MLA},
    "mixture": {"ffn": MOE},
    "window": {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 4, "mask": {"kind": "window", "size": 3}}
    },
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 30], [31, 0, 0, 7, 8, 3, 2, 3, 8, 4]])


class Random:
    """Weights of a model, drawn; `asked` is what was read, in order."""

    def __init__(self, tmp_path, model):
        self.path, self.model, self.asked = tmp_path, model, []
        built = whole(self)
        chance = torch.Generator().manual_seed(1)
        state = built.state_dict()
        self.state = {
            name: 0.3 * torch.randn(each.shape, generator=chance, dtype=each.dtype) for name, each in state.items()
        }
        self.names = dict.fromkeys(self.state)

    def read(self, name):
        self.asked.append(name)
        return self.state[name]


def whole(source):
    section = plain(tiny(model=source.model | {"core": "eager"}).model)
    recipe = from_mapping({**plain(tiny()), "model": section}).recipe
    return build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu").eval()


def source_of(tmp_path, **changes):
    return Random(tmp_path, plain(tiny(**changes).model))


def streams(model):
    """[rows, s, h] behind the last block."""
    with model.embedding():
        rows = [model.embedded(row) for row in range(len(TOKENS))]
    for layer in range(model.layers):
        with model.held(f"blocks.{layer}"):
            rows = [model.block(layer, x) for x in rows]
    return torch.cat(rows)


def computed(source):
    model = Streamed(source, TOKENS, torch.float64)
    x = streams(model)
    with model.held(NORM):
        return torch.cat(list(model.logits(model.norm(x), source.read(model.head))), -1)


def sequence():
    place = torch.arange(TOKENS.shape[1]).expand(len(TOKENS), -1)
    return Sequence(place, torch.zeros_like(place), torch.arange(len(TOKENS)), dtype=torch.float64)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_logits_are_those_of_the_whole_model(tmp_path, kind):
    source = source_of(tmp_path, **MODELS[kind])
    model = whole(source)
    model.load_state_dict(source.state)
    torch.testing.assert_close(computed(source), model(TOKENS, sequence()), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_head_in_pieces_is_the_head(tmp_path, monkeypatch):
    source = source_of(tmp_path)
    expected = computed(source)
    monkeypatch.setattr("shardforge.families.streamed.CHUNK_BYTES", 5 * 8 * HIDDEN)
    model = Streamed(source, TOKENS, torch.float64)
    pieces = list(model.logits(torch.zeros(1, 2, HIDDEN, dtype=torch.float64), source.read(model.head)))
    assert [piece.shape[-1] for piece in pieces] == [5] * 6 + [2] and sum(piece.shape[-1] for piece in pieces) == VOCAB
    torch.testing.assert_close(computed(source), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_further_predictions_are_those_of_the_whole_model(tmp_path):
    source = source_of(tmp_path, model={"mtp": NEXT})
    model = whole(source)
    model.load_state_dict(source.state)
    seen = []
    model.mtp.register_forward_pre_hook(lambda module, args: seen.append(args))
    seq = sequence()
    batch = Batch(TOKENS, TOKENS, seq.positions, seq.documents, seq.rows)
    seq.ahead = batch.look_ahead(2).ahead
    model(TOKENS, seq, TOKENS)
    expected = [vectors for vectors, _ in model.mtp(*seen[0])]
    ours = Streamed(source, TOKENS, torch.float64)
    x = streams(ours)
    with ours.held(NORM), ours.embedding(), ours.held(MTP):
        rows = [torch.stack(list(ours.further(x[row : row + 1], ours.norm(x[row : row + 1]), row))) for row in (0, 1)]
    torch.testing.assert_close(torch.cat(rows, 1), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_a_part_is_in_memory_only_while_it_is_held(tmp_path):
    source = source_of(tmp_path)
    model = Streamed(source, TOKENS)
    with model.held("blocks.1"):
        held = {name for name, weight in model.model.named_parameters() if not weight.is_meta}
        assert held == {name for name in source.names if name.startswith("blocks.1.")} == set(source.asked)
    assert all(weight.is_meta for weight in model.model.parameters())


def test_of_the_embedding_only_rows_of_the_tokens_are_held(tmp_path):
    model = Streamed(source_of(tmp_path), TOKENS)
    with model.embedding():
        assert model.now("embed.weight").shape == (len(TOKENS.unique()), HIDDEN)


def test_a_weight_that_is_missing_is_named(tmp_path):
    source = source_of(tmp_path)
    del source.names["blocks.1.ffn.up.weight"]
    with pytest.raises(Problems, match=r"blocks.1.ffn.up.weight \[24, 16\] is missing"):
        Streamed(source, TOKENS)


def test_blocks_that_memory_cannot_hold_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    source = source_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks.0 takes .* of memory are free"):
        Streamed(source, TOKENS)
    assert not source.asked


@torch.no_grad()
def test_a_run_of_ours_is_a_source(run_of):
    run, weights = run_of(mixer={"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 4})
    source = open_source(run.path)
    model = Streamed(source, TOKENS)
    with model.held(HEAD):
        assert torch.equal(model.now("head.weight"), weights["head.weight"])
