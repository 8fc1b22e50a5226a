"""Real weights: SmolLM2-135M-Instruct from the package that ships it computes what transformers computes."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardforge.core.optional import installed
from shardforge.core.rundir import RunDir
from shardforge.evals.generate import generate
from shardforge.evals.open import open_trained
from shardforge.families.open import open_source
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import load
from shardforge.recipe.provenance import differences
from shardforge.upcycle import run
from shardforge.upcycle.loss import loss, tokenized
from shardforge.upcycle.options import read_options
from tests.parity.compare import quiet
from tests.tiny import tiny
from tests.unit.convert.folders import converted
from tools import smollm2

pytestmark = pytest.mark.slow
TOLERANCE = 2e-6  # float32, relative to the norm of the expected tensor
PUBLISHED = 134_515_008  # weights, tied embedding counted once
TEXT = "The capital of France is Paris, and 2048 is a power of two.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    for package in (smollm2.PACKAGE, "gguf", "transformers"):
        if not installed(package):
            pytest.skip(f"{package} is not installed")
    path = tmp_path_factory.mktemp("smollm2") / "folder"
    smollm2.convert(path)
    return path


def test_the_logits_are_those_of_transformers(folder):
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids])
    source = open_source(folder)
    recipe = tiny(model=source.model)
    ours = build(recipe.model, recipe.objective.build()).to_empty(device="cpu")
    ours.load_state_dict({name: source.read(name) for name in source.names})
    places = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
        got = ours.eval()(tokens, Sequence(places, torch.zeros_like(places), torch.arange(1)))
    assert ((got - expected).norm() / expected.norm()).item() < TOLERANCE


def test_it_has_the_published_number_of_weights(folder):
    names = open_source(folder).names.values()
    assert sum(torch.Size(info.shape).numel() for info in names) == PUBLISHED


def test_the_shipped_recipe_is_this_model(folder):
    told = differences(open_source(folder).model, load("smollm2-135m").recipe.model)
    assert [each for each in told if each[0] != "stack"] == []


def test_digits_stand_alone_and_text_comes_back(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("2048").tokens == ["2", "0", "4", "8"]
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


@pytest.fixture(scope="module")
def around(folder, tmp_path_factory) -> list[Path]:
    """The folder after Megatron and DeepSpeed: as a run of ours, and published again."""
    place, at, made = tmp_path_factory.mktemp("ring"), folder, []
    for number, to in enumerate(("shardforge", "megatron", "shardforge", "deepspeed", "shardforge", "huggingface")):
        at = converted(at, place / f"{number}-{to}", to, proof="auto").path
        made.append(at)
        for old in made[:-2]:
            shutil.rmtree(old, ignore_errors=True)
    return made[-2:]


def test_around_the_ring_every_tensor_is_what_it_was(folder, around):
    before, after = (load_file(path / "model.safetensors") for path in (folder, around[1]))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_around_the_ring_perplexity_on_real_text_is_unchanged(folder, around, tmp_path):
    (tmp_path / "text").write_text(Path(argparse.__file__).read_text())
    tokens = tokenized(tmp_path / "text", folder / "tokenizer.json", 49152)[:2, :257]
    assert loss(open_source(around[0]), tokens) == loss(open_source(folder), tokens)


def test_around_the_ring_the_likeliest_continuation_is_that_of_transformers_token_by_token(folder, around):
    from transformers import AutoModelForCausalLM

    trained = open_trained(RunDir(around[0]))
    trained.model.float()
    prompt = trained.tokenizer.encode(TEXT, add_special_tokens=False).ids
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with quiet():
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    end = wanted.index(trained.eos) if trained.eos in wanted else len(wanted)
    got = generate(trained, [TEXT], 24, 0.0, 1.0, 0)[0]
    assert got == trained.tokenizer.decode(wanted[:end]) and end > 4


def upcycled(folder: Path, output: Path, **flags: object) -> run.Upcycled:
    """To 8 experts in three of its layers."""
    given = {"experts": 8, "k": 2, "layers": "0,14,29", **flags}
    return run.upcycle(folder, output, read_options(flags=given), processes=1)


def test_half_of_the_neurons_drawn_anew_leave_half_of_the_cosine(folder, tmp_path):
    matrices = upcycled(folder, tmp_path / "out", method={"kind": "drop", "ratio": 0.5}).report["matrices"]
    assert len(matrices) == 3
    for each in matrices.values():
        assert each["redrawn"] == 0.5
        assert each["cosine_to_dense"] == pytest.approx(0.5, abs=0.03)  # 1 - r
        assert each["cosine_between_experts"] == pytest.approx(0.25, abs=0.03)  # (1 - r)^2


def test_copied_experts_have_the_dense_loss_at_step_0(folder, tmp_path):
    made = upcycled(folder, tmp_path / "out", method="naive")
    (tmp_path / "text").write_text(Path(pytest.__file__).read_text())
    tokens = tokenized(tmp_path / "text", folder / "tokenizer.json", 49152)[:1, :129]
    assert loss(open_source(made.step), tokens) == pytest.approx(loss(open_source(folder), tokens), rel=1e-6)
