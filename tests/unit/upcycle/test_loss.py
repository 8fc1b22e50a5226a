"""Step 0 through the real models: what the result computes against what its source computes."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from shardforge.core.errors import CheckpointError, DataError
from shardforge.families.open import open_source
from shardforge.upcycle import pieces, run
from shardforge.upcycle.loss import loss, tokenized
from shardforge.upcycle.options import read_options
from tests.tiny import VOCAB
from tests.unit.upcycle import dense

TOKENS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(2))
RELU2 = {"kind": "mlp", "inner": 24, "activation": "relu2"}


def losses(source, output, **flags):
    """Of the dense model and of the result, in nats a token."""
    made = run.upcycle(source, output, read_options(flags={"experts": 4} | flags), processes=1)
    return loss(open_source(source), TOKENS), loss(open_source(made.step), TOKENS), made.report["step_0"]


@pytest.fixture(scope="module")
def squared(tmp_path_factory):
    return dense.save(tmp_path_factory.mktemp("relu2") / "run", ffn=RELU2)


@pytest.mark.parametrize("gate", ["renormalized", "topk_first"])
def test_naive_experts_compute_what_the_source_does(source, tmp_path, gate):
    before, after, said = losses(source, tmp_path / "out", method="naive", gate=gate)
    assert after == pytest.approx(before, rel=1e-6) and said["verdict"] == "exact"


def test_biased_experts_do_too(tmp_path):
    biased = dense.save(tmp_path / "biased", ffn={"kind": "glu", "inner": 24, "bias": True})
    before, after, _ = losses(biased, tmp_path / "out", method="naive")
    assert after == pytest.approx(before, rel=1e-6)


def test_drop_does_not_and_says_so(source, tmp_path):
    before, after, said = losses(source, tmp_path / "out")
    assert abs(after - before) > 1e-3 and said["verdict"] == "no"


def test_raw_gates_do_not_and_the_scale_is_offered(source, tmp_path):
    before, after, said = losses(source, tmp_path / "out", method="naive", gate="raw")
    assert abs(after - before) > 1e-3
    assert said["verdict"] == "no" and "--scale virtual_group" in said["fixes"][0] and "1/2" in said["reasons"][0]


@pytest.mark.parametrize("gate", ["renormalized", "topk_first"])
@pytest.mark.parametrize("k", [2, 4])
def test_slices_of_a_squared_relu_compute_what_the_source_does(squared, tmp_path, gate, k):
    """G = 2 slices; also where a token takes several groups."""
    flags = {"method": "virtual_group", "expert_ffn": 12, "experts": 8, "k": k, "gate": gate}
    before, after, said = losses(squared, tmp_path / "out", **flags)
    assert after == pytest.approx(before, rel=1e-6) and said["verdict"] == "exact"


def test_with_raw_gates_slices_are_exact_for_an_even_router_only(squared, tmp_path, monkeypatch):
    flags = {
        "method": "virtual_group",
        "expert_ffn": 12,
        "experts": 8,
        "k": 2,
        "gate": "raw",
        "router_init": "normal_002",
    }
    before, after, said = losses(squared, tmp_path / "out", **flags)
    assert after != pytest.approx(before, rel=1e-6) and said["verdict"] == "even"
    monkeypatch.setitem(pieces.ROUTERS, "normal_002", lambda draw, shape: draw.standard_normal(shape, "f") * 1e-12)
    before, after, _ = losses(squared, tmp_path / "even", **flags)
    assert after == pytest.approx(before, rel=1e-6)


def test_a_silu_is_not_scaled_exactly_and_the_report_says_so(source, tmp_path):
    flags = {"method": "virtual_group", "expert_ffn": 12, "experts": 8, "k": 2}
    _, _, said = losses(source, tmp_path / "out", **flags)
    assert said["verdict"] == "near" and "silu" in said["reasons"][0]


def test_a_text_becomes_rows_of_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "text"
    text.write_text("a b " * 600)
    rows = tokenized(text, tmp_path / "tokenizer.json", 3)
    assert rows.shape == (2, 513) and rows[0, :3].tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="table has 1 rows"):
        tokenized(text, tmp_path / "tokenizer.json", 1)
    text.write_text("a")
    with pytest.raises(DataError, match="1 tokens"):
        tokenized(text, tmp_path / "tokenizer.json", 3)


def test_a_model_whose_blocks_memory_cannot_hold_is_refused_before_one_is_read(monkeypatch, source):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(CheckpointError, match="of memory are free"):
        loss(open_source(source), TOKENS)
