from __future__ import annotations

import json
import shutil

import pytest
import torch

from shardforge.core.errors import CheckpointError, ForgeError
from tests.unit.convert.folders import converted, weights
from tests.unit.upcycle import dense

transformers = pytest.importorskip("transformers", reason="the transformers package reads the folders")


def config_of(made):
    return json.loads((made.path / "config.json").read_text())


@pytest.mark.parametrize("shard_bytes", [4000, 1 << 30])
def test_transformers_loads_every_number(run, tmp_path, shard_bytes):
    made = converted(run, tmp_path / "hf", shard_bytes=shard_bytes)
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, ours = theirs.state_dict(), weights(run)
    assert torch.equal(state["model.layers.1.mlp.down_proj.weight"], ours["blocks.1.ffn.down.weight"])
    assert sum(each.numel() for each in theirs.parameters()) == sum(each.numel() for each in ours.values())


def test_one_file_has_no_index_and_several_have_one(run, tmp_path):
    one, many = converted(run, tmp_path / "one"), converted(run, tmp_path / "many", shard_bytes=4000)
    assert [file.name for file in sorted(one.path.glob("*.safetensors*"))] == ["model.safetensors"]
    index = json.loads((many.path / "model.safetensors.index.json").read_text())
    count = len(set(index["weight_map"].values()))
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)
    ]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(run).values())


@pytest.mark.parametrize("asked, dtype", [("source", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_the_type_stands_in_config_json(run, tmp_path, asked, dtype):
    made = converted(run, tmp_path / "hf", dtype=asked)
    assert config_of(made)["torch_dtype"] == dtype
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made.path)
    assert str(next(loaded.parameters()).dtype) == f"torch.{dtype}"


def test_the_length_is_that_of_the_training(run, tmp_path):
    assert config_of(converted(run, tmp_path / "hf"))["max_position_embeddings"] == 16


def test_special_tokens_that_nobody_knows_are_none_and_not_the_defaults_of_a_class(run, tmp_path):
    made = converted(run, tmp_path / "hf")
    theirs = transformers.AutoConfig.from_pretrained(made.path)
    assert theirs.bos_token_id is None and theirs.eos_token_id is None
    assert transformers.GenerationConfig.from_pretrained(made.path).eos_token_id is None


def test_special_tokens_and_tokenizer_go_through_ours(published, tmp_path):
    converted(published, tmp_path / "ours", "shardforge")
    made = converted(tmp_path / "ours", tmp_path / "back")
    assert config_of(made)["eos_token_id"] == [2, 3]
    assert (made.path / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_named_goes_along(run, published, tmp_path):
    made = converted(run, tmp_path / "hf", tokenizer=published)
    assert (made.path / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_vocabulary_is_refused(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    table = {"model": {"vocab": {f"t{number}": number for number in range(33)}}}
    (other / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="token 32 of this tokenizer has no row in the model's table of vocab=32"):
        converted(run, tmp_path / "hf", tokenizer=other)
    assert not (tmp_path / "hf").exists()


def test_a_token_that_was_added_behind_the_last_row_is_told(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    table = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 32, "content": "<image>"}]}
    (other / "tokenizer.json").write_text(json.dumps(table))
    made = converted(run, tmp_path / "hf", tokenizer=other)
    assert (made.path / "tokenizer.json").is_file()
    assert [line for line in made.certificate["left"] if line.startswith("token 32 of tokenizer.json, which was added")]


def test_what_else_lies_in_a_published_folder_is_told(published, tmp_path):
    copy = shutil.copytree(published, tmp_path / "copy")
    for name in ("tokenization_kimi.py", "LICENSE", "tiktoken.model", "pytorch_model.bin"):
        (copy / name).write_text("x")
    made = converted(copy, tmp_path / "hf")
    assert (made.path / "tiktoken.model").read_text() == "x" and not (made.path / "tokenization_kimi.py").exists()
    assert made.certificate["left"][:2] == [
        "tokenization_kimi.py: code, which is never copied; what needs it has to be told where it is",
        "LICENSE, pytorch_model.bin: neither weights nor of a tokenizer that is known",
    ]


def test_a_folder_without_a_tokenizer_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        converted(run, tmp_path / "hf", tokenizer=tmp_path)


def test_what_has_no_place_is_listed(run, tmp_path):
    left = converted(run, tmp_path / "hf").certificate["left"]
    assert [line.partition(" (")[0].partition(",")[0] for line in left] == [
        "what the optimizer kept for each weight", "the step", "the recipe beyond the model",
    ]  # fmt: skip


def test_a_layout_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="no layout"):
        converted(run, tmp_path / "hf", layout={"tp": 2})


def test_a_model_that_no_family_can_say_names_the_field(tmp_path):
    odd = dense.save(
        tmp_path / "odd", ffn={"kind": "glu", "inner": 24, "activation": "relu2"}, residual={"kind": "sandwich"}
    )
    with pytest.raises(ForgeError, match="no published family"):
        converted(odd, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.parametrize("between", ["shardforge", "deepspeed", "megatron"])
def test_an_architecture_comes_back_where_another_could_say_the_model_too(run, tmp_path, between):
    hf = converted(run, tmp_path / "hf")
    told = config_of(hf) | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    (hf.path / "config.json").write_text(json.dumps(told))
    there = converted(hf.path, tmp_path / "there", between)
    back = converted(there.path, tmp_path / "back")
    assert config_of(hf)["architectures"] == config_of(back)["architectures"] == ["MistralForCausalLM"]
