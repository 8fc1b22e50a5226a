"""Folders that transformers writes, read as ours: the logits are theirs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardforge.checkpoint.tensorfile import TYPES
from shardforge.core.errors import CheckpointError, DataError, Problems
from shardforge.families.huggingface import HuggingFaceSource
from shardforge.families.open import open_source
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from tests.tiny import tiny

transformers = pytest.importorskip("transformers", reason="the transformers package writes the folders")

VOCAB, LAYERS, LENGTH = 48, 3, 19
SHARED = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
GPT2 = {
    **{"n_embd": 24, "n_head": 4, "n_layer": LAYERS, "vocab_size": VOCAB, "n_positions": 64, "n_inner": 40},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None},
    "attn_implementation": "eager",
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHARED, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
}


def random_model(config: Any) -> nn.Module:
    """Of a transformers config, every weight away from its start so that no role can be taken for another."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape) * 0.2)
    return theirs.eval()


def saved(path: Path, config: Any, **how: Any) -> nn.Module:
    theirs = random_model(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(path, **how)
    return theirs


def loaded(path: Path) -> nn.Module:
    """The model that a source describes, with its weights."""
    source = open_source(path)
    recipe = tiny(model=source.model)
    ours = build(recipe.model, recipe.objective.build())
    ours.to_empty(device="cpu")
    ours.load_state_dict({name: source.read(name) for name in source.names})  # strict: all names, nothing else
    return ours.eval()


def logits(theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        return theirs(tokens).logits, ours(tokens, Sequence(positions, torch.zeros_like(positions), torch.arange(2)))


def change(path: Path, **settings: Any) -> None:
    config = path / "config.json"
    kept = json.loads(config.read_text()) | settings
    config.write_text(json.dumps({key: value for key, value in kept.items() if value != "gone"}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    saved(path, MODELS["llama"]())
    return path


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_in_several_files_is_read(tmp_path):
    theirs = saved(tmp_path, MODELS["llama"](), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected, got = logits(theirs, loaded(tmp_path))
    assert torch.allclose(expected, got, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_the_type_and_the_bits_that_they_are_stored_with(tmp_path, dtype):
    from safetensors.torch import load_file

    theirs = random_model(MODELS["gpt2"]()).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    source = HuggingFaceSource(tmp_path)
    before, after = load_file(tmp_path / "model.safetensors"), dict(source.map.to(source.read))
    assert {TYPES[info.dtype][0] for info in source.names.values()} == {dtype}
    assert before.keys() == after.keys()
    assert not [name for name, each in before.items() if each.dtype != dtype or not torch.equal(each, after[name])]


def test_tensors_that_are_no_weights_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path, MODELS["gpt2"]())
    state = load_file(tmp_path / "model.safetensors")
    state |= {"lm_head.weight": state["transformer.wte.weight"].clone(), "transformer.h.0.attn.bias": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert any(line.startswith("lm_head.weight and 1 more: ") for line in HuggingFaceSource(tmp_path).beside.unread)


def test_a_prefix_that_old_files_leave_out_is_put_back(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = saved(tmp_path, MODELS["gpt2"]())
    state = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors")
    expected, got = logits(theirs, loaded(tmp_path))
    assert torch.allclose(expected, got, atol=1e-4)


@pytest.mark.parametrize("old", ["type", "rope_type"])
def test_positions_as_older_files_write_them_are_the_same(copy, old):
    scaling = {old: "linear", "factor": 4.0}
    change(copy, rope_parameters="gone", rope_theta=500.0, rope_scaling=scaling)
    position = open_source(copy).model["blocks"]["dense"]["mixer"]["position"]
    assert (position["base"], position["scaling"]) == (500.0, {"kind": "linear", "factor": 4.0})


def test_an_unknown_architecture_lists_the_known_ones(copy):
    change(copy, architectures=["MambaForCausalLM"])
    with pytest.raises(CheckpointError, match=r"\['MambaForCausalLM'\](.|\n)*GPT2LMHeadModel, .*LlamaForCausalLM"):
        open_source(copy)


def test_all_that_the_settings_cannot_mean_is_told_at_once(copy):
    scaling = {"rope_type": "longrope", "factor": 2.0}
    change(copy, vocab_size="gone", hidden_act="tanh", rope_parameters=scaling, quantization_config={"bits": 4})
    with pytest.raises(Problems) as caught:
        open_source(copy)
    told = str(caught.value)
    assert all(word in told for word in ("vocab_size is missing", "hidden_act='tanh'", "'longrope'", "dequantised"))


def test_all_weights_that_do_not_fit_are_told_at_once(copy):
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    del state["model.norm.weight"]
    state |= {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 4), "extra.weight": torch.zeros(2)}
    save_file(state, copy / "model.safetensors")
    with pytest.raises(Problems) as caught:
        open_source(copy)
    told = str(caught.value)
    assert "model.norm.weight is missing, for norm.weight [24]" in told
    assert "gives blocks.0.ffn.up.weight [3, 4], config.json says [40, 24]" in told
    assert "extra.weight [2] has no place in this model" in told


def test_pickled_weights_are_not_opened(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"can run any code(.|\n)*save_pretrained"):
        open_source(copy)


def test_a_head_that_is_called_tied_and_is_not_is_refused(copy):
    change(copy, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        open_source(copy)


def test_a_file_that_the_index_names_and_is_missing_is_named(tmp_path):
    saved(tmp_path, MODELS["llama"](), max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"files of the index are missing: {gone.name}"):
        open_source(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    saved(tmp_path, MODELS["llama"](), max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'../other.safetensors' is not a file of this folder"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_settings_that_are_none_are_refused(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(DataError):
        open_source(copy)


def test_a_damaged_file_is_named(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(Problems, match=r"ends at byte 72096 of the numbers, the file has 72087(.|\n)*get it again"):
        HuggingFaceSource(copy)
