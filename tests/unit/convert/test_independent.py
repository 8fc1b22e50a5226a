"""What transformers is asked, and when it is not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from shardforge.convert import independent
from shardforge.convert.independent import computed, obstacle
from shardforge.core.errors import CheckpointError
from shardforge.families.source import Info

transformers = pytest.importorskip("transformers")
LLAMA = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    return tmp_path


def source(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return SimpleNamespace(path=folder, names={"embed.weight": Info((48, 16), "bfloat16")})


def without(folder, name):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_it_computes_what_the_class_that_config_json_names_does(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    found = computed(folder, TOKENS)
    torch.testing.assert_close(found.logits, expected)
    assert len(found.streams) == 2 and found.name.endswith("LlamaForCausalLM") and not found.unread


def test_a_tensor_that_it_would_draw_at_random_is_refused(folder):
    without(folder, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"missing keys: model.layers.1.mlp.up_proj.weight"):
        computed(folder, TOKENS)


def test_what_it_cannot_load_is_told(folder):
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot compute it"):
        computed(folder, TOKENS)


def test_code_in_the_folder_never_runs(folder):
    (folder / "own.py").write_text("raise SystemExit('ran')")
    source(folder, auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"})
    assert computed(folder, TOKENS).logits.shape == (1, 5, 48)


def test_a_folder_of_ours_is_an_obstacle(tmp_path):
    assert "is no Hugging Face folder" in obstacle(SimpleNamespace(path=tmp_path, names={}))


def test_an_architecture_that_only_code_in_a_folder_has_is_an_obstacle(folder):
    assert "has no OwnForCausalLM of its own" in obstacle(source(folder, architectures=["OwnForCausalLM"]))


def test_quantised_weights_are_an_obstacle(folder):
    assert "quantised" in obstacle(source(folder, quantization_config={"quant_method": "fp8"}))


def test_the_lack_of_the_package_is_an_obstacle(folder, monkeypatch):
    monkeypatch.setattr(independent, "installed", lambda name: False)
    assert "not installed" in obstacle(source(folder))


def test_a_model_larger_than_memory_is_an_obstacle(folder, monkeypatch):
    monkeypatch.setattr(independent, "free", lambda: 1000)
    assert "transformers would take" in obstacle(source(folder))


def test_a_model_that_fits_is_none(folder):
    assert obstacle(source(folder)) == ""
