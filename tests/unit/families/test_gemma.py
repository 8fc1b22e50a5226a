"""Gemma 2 and 3 as they were released: their config.json, and what of it cannot be computed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.family import families
from shardforge.families.open import open_source
from shardforge.families.publish import publish
from shardforge.families.section import apart, whole
from shardforge.families.settings import Settings
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import load_model, shipped
from shardforge.recipe.provenance import plain
from tests.tiny import tiny

SHARED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float32",
    "use_cache": True,
}
GEMMA2: dict[str, Any] = SHARED | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3: dict[str, Any] = SHARED | {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def sized(config: dict[str, Any], *sizes: int, **changes: Any) -> dict[str, Any]:
    return config | dict(zip(SIZES, sizes, strict=True)) | changes


RELEASED = {
    "gemma2-2b": sized(GEMMA2, 2304, 26, 8, 4, 9216),
    "gemma2-9b": sized(GEMMA2, 3584, 42, 16, 8, 14336, sliding_window_size=4096),
    "gemma2-27b": sized(GEMMA2, 4608, 46, 32, 16, 36864, head_dim=128, query_pre_attn_scalar=144),
    "gemma3-1b": sized(GEMMA3, 1152, 26, 4, 1, 6912),
}


def read(config: dict[str, Any]) -> dict[str, Any]:
    settings = Settings(config, Path("config.json"))
    told = families()[config["architectures"][0]].model(settings)
    settings.settle()
    return whole(told, "config.json")


def recipe(name: str) -> dict[str, Any]:
    return plain(load_model(shipped() / "models" / f"{name}.yaml").recipe.model)


def sections(config: dict[str, Any], field: str) -> list[Any]:
    """A field of the mixers of all layers."""
    section = read(config)
    names = [name for entry in section["stack"] for name in [entry.split(" x ")[0]] * int((entry + " x 1").split()[2])]
    return [section["blocks"][name]["mixer"][field] for name in names]


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_settings_are_the_recipe(name):
    assert apart(recipe(name), read(RELEASED[name])) == []


@pytest.mark.parametrize("name", RELEASED)
def test_the_recipe_is_published_in_the_released_words(name):
    found = publish(recipe(name), name).config
    unknown = {"cache_implementation", "hidden_act", "max_position_embeddings", "torch_dtype", "use_cache"}
    unknown |= {"sliding_window_pattern", "sliding_window_size"}
    unknown |= {key for key in SHARED if key.endswith("token_id")}
    wanted = {key: value for key, value in RELEASED[name].items() if key not in unknown}
    assert {key: found.get(key) for key in wanted} == wanted


def test_what_the_settings_of_gemma2_leave_out_is_what_the_architecture_takes():
    sizes = {key: RELEASED["gemma2-2b"][key] for key in (*SIZES, "architectures", "vocab_size")}
    assert apart(recipe("gemma2-2b"), read(sizes)) == []


def test_a_cap_of_null_is_none_although_the_architecture_has_one():
    section = read(RELEASED["gemma2-2b"] | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert {block["mixer"]["softcap"] for block in section["blocks"].values()} == {None}
    assert section["head"] == {"kind": "tied"}


def test_a_scaling_is_of_layers_that_see_all_alone():
    config = RELEASED["gemma3-1b"] | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    positions = sections(config, "position")
    assert [position["base"] for position in positions[4:7]] == [1e4, 1e6, 1e4]
    assert [position["scaling"] for position in positions[4:6]] == [None, {"kind": "linear", "factor": 8.0}]


@pytest.mark.parametrize("field", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_one_layer_of_each_period_sees_all(field):
    config = RELEASED["gemma3-1b"] | {"sliding_window_pattern": None, field: 3}
    assert [mask["kind"] for mask in sections(config, "mask")[:6]] == ["window", "window", "causal"] * 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2-2b", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 is no positive number"),
        ("gemma2-2b", {"final_logit_softcapping": "30"}, "final_logit_softcapping='30' should be of the type"),
        ("gemma2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 is no positive number"),
        ("gemma2-2b", {"use_bidirectional_attention": True}, "only causal attention is supported"),
        ("gemma2-2b", {"hidden_act": "silu"}, "hidden_act='silu' is not supported, only 'gelu_pytorch_tanh'"),
        ("gemma2-2b", {"hidden_activation": "tanh"}, "hidden_activation='tanh' is not supported"),
        ("gemma2-2b", {"sliding_window_size": 8}, "sliding_window_size=8 is not supported, only 4096"),
        ("gemma2-2b", {"num_attention_heads": 7}, "hidden_size=2304 is no multiple of num_attention_heads=7"),
        ("gemma2-2b", {"attention_multiplier": 2.0}, "attention_multiplier=2.0 is a field that is not supported"),
        ("gemma3-1b", {"attn_logit_softcapping": 50.0}, "this architecture has no place for it"),
        ("gemma3-1b", {"sliding_window_pattern": "6"}, "sliding_window_pattern='6' should be of the type"),
        ("gemma3-1b", {"rope_parameters": {"full_attention": "yarn"}}, "should be mappings, not {} and 'yarn'"),
        ("gemma3-1b", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters has rope_theta beside"),
        (
            "gemma3-1b",
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor=0.5 is not supported",
        ),
    ],
)
def test_what_cannot_be_computed_is_an_error_that_names_it(name, changes, message):
    with pytest.raises(Problems) as caught:
        read(RELEASED[name] | changes)
    assert message in str(caught.value)


IMAGES: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
"""gemma-3-4b-pt, as it was released."""


def test_the_language_model_of_a_gemma3_with_images_is_a_gemma3_for_text():
    text = GEMMA3 | IMAGES["text_config"] | {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
    assert apart(read(text), read(IMAGES)) == []


def test_what_the_language_model_of_a_gemma3_with_images_cannot_compute_is_named():
    text = IMAGES["text_config"] | {"attention_multiplier": 2.0, "query_pre_attn_scalar": -1}
    with pytest.raises(Problems) as caught:
        read(IMAGES | {"text_config": text})
    for part in ("attention_multiplier=2.0 is a field", "query_pre_attn_scalar=-1 is no positive number"):
        assert part in str(caught.value)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> tuple[Any, Path]:
    """(a tiny Gemma 3 of transformers that sees images, its folder)."""
    transformers = pytest.importorskip("transformers", reason="transformers writes the folder")
    text = dict(zip(SIZES, (24, 7, 4, 2, 40), strict=True)) | {"head_dim": 8, "vocab_size": 48, "sliding_window": 4}
    tower = dict(zip(SIZES, (16, 1, 2, 2, 16), strict=True)) | {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text | {"query_pre_attn_scalar": 4, "max_position_embeddings": 64, "pad_token_id": None},
        vision_config=tower,
        mm_tokens_per_image=4,
        image_token_index=47,
        attn_implementation="eager",
    )
    folder = tmp_path_factory.mktemp("seeing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for weight in theirs.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        theirs.save_pretrained(folder)
    return theirs, folder


def renamed(folder: Path, target: Path) -> None:
    """The same folder in the names that transformers 4.52 to 4.57 gave."""
    state = load_file(folder / "model.safetensors")
    moved = {f"model.{name}".replace("language_model.model.", "language_model."): each for name, each in state.items()}
    save_file(moved, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


@pytest.mark.parametrize("released", [True, False])
def test_text_without_images_is_what_transformers_computes_of_it(seeing, tmp_path, released):
    theirs, folder = seeing
    if not released:
        renamed(folder, tmp_path)
    source = open_source(folder if released else tmp_path)
    described = tiny(model=source.model)
    ours = build(described.model, described.objective.build()).to_empty(device="cpu").eval()
    ours.load_state_dict({name: source.read(name) for name in source.names})
    tokens = torch.randint(0, 45, (2, 19), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(19).expand(2, -1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(input_ids=tokens).logits
        got = ours(tokens, Sequence(positions, torch.zeros_like(positions), torch.arange(2)))
    assert ((got - expected).norm() / expected.norm()).item() < 2e-5


def test_the_tensors_that_see_images_are_told_as_left_behind(seeing):
    _, folder = seeing
    beside = open_source(folder).beside
    assert any("tensors of the image tower and its projector" in line for line in beside.unread)
    assert beside.length == 64


def test_a_language_model_out_of_a_gemma3_with_images_is_published_for_text(seeing):
    _, folder = seeing
    assert publish(open_source(folder).model, folder).config["architectures"] == ["Gemma3ForCausalLM"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 20.0}, "mixer.softcap: 50.0 here, 20.0 there"),
        ({"scale": 0.3}, "mixer.scale"),
        ({"sinks": "learned"}, "mixer.sinks: 'learned' here, 'none' there"),
    ],
)
def test_what_gemma2_cannot_say_is_not_published(change, message):
    section = recipe("gemma2-2b")
    section["blocks"]["far"]["mixer"] |= change
    with pytest.raises(CheckpointError) as caught:
        publish(section, "recipe")
    told = str(caught.value)
    assert message in told or message.replace("50.0 here, 20.0", "20.0 here, 50.0") in told
