"""What the headers of a checkpoint say, whatever its format, and of one that is damaged."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from shardforge.checkpoint import tensorfile, tensorheader
from shardforge.convert.inspect import Inspection, inspect
from shardforge.core.errors import CheckpointError
from shardforge.families import gguf_file
from shardforge.families.family import families
from shardforge.families.open import KINDS, open_source
from shardforge.families.section import apart, whole
from shardforge.families.settings import Settings
from tests.unit.convert import counted
from tests.unit.convert.folders import converted

FORMATS = ("huggingface", "megatron", "deepspeed", "shardforge")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return counted.save(tmp_path_factory.mktemp("counted") / "run")


@pytest.fixture(scope="module")
def checkpoints(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained run in every format that is written."""
    base = tmp_path_factory.mktemp("formats")
    for to in FORMATS:
        converted(trained, base / to, to=to)
    return {to: base / to for to in FORMATS}


@pytest.fixture
def copied(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """copied("megatron"): one of them that may be damaged."""
    return lambda to: Path(shutil.copytree(checkpoints[to], tmp_path / to))


def told(found: Inspection) -> str:
    return "\n".join(found.problems)


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_is_recognised_and_has_no_problem(checkpoints, to):
    found = inspect(checkpoints[to])
    assert (found.opened.kind, found.problems) == (to, ())


@pytest.mark.parametrize("to", FORMATS)
def test_names_shapes_and_model_are_those_of_the_source(checkpoints, trained, to):
    found, source = inspect(checkpoints[to]), open_source(trained)
    assert {name: info.shape for name, info in found.opened.names.items()} == {
        name: info.shape for name, info in source.names.items()
    }
    assert found.model is not None and apart(found.model, source.model) == []


@pytest.mark.parametrize("to", [kind for kind in FORMATS if kind != "huggingface"])
def test_step_and_moments_are_told_where_there_are_any(checkpoints, to):
    found = inspect(checkpoints[to])
    assert found.beside.step == counted.STEP
    assert found.opened.source is not None and found.opened.source.moments == ("exp_avg", "exp_avg_sq")


def test_weights_are_counted_by_role(run):
    found = inspect(run).counts
    assert found is not None
    hidden, inner, vocab = 16, 24, 32
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    assert (found.total, found.embedding) == (2 * layer + 2 * vocab * hidden + hidden, vocab * hidden)
    assert [(each.mixer, each.ffn) for each in found.blocks] == [(4 * hidden * hidden, 3 * hidden * inner)]


def test_types_are_counted_in_tensors_numbers_and_bytes(tmp_path):
    save_file({"a": torch.zeros(4, 5), "b": torch.zeros(3).bfloat16(), "c": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert inspect(tmp_path / "x.safetensors").types == {"float32": (2, 22, 88), "bfloat16": (1, 3, 6)}


def test_all_files_count(published):
    assert sum(path.stat().st_size for path in published.iterdir()) == inspect(published).laid.bytes


RANKS: dict[str, tuple[str, list[str], int | None, str]] = {
    "huggingface": ("huggingface", ["config.json", "model.safetensors"], None, ""),
    "torch_dist": ("megatron", [".metadata", "__0_0.distcp", "__0_1.distcp", "__5_0.distcp"], 2, ""),
    "legacy": ("megatron", [f"mp_rank_0{t}_00{p}/model_optim_rng.pt" for t in (0, 1) for p in range(3)], 6, "tp2-pp3"),
    "ZeRO 2": (
        "deepspeed",
        ["mp_rank_00_model_states.pt", *(f"bf16_zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in range(4))],
        4,
        "dp4",
    ),
    "ZeRO 3": (
        "deepspeed",
        [f"zero_pp_rank_{n}_mp_rank_00_{what}_states.pt" for n in range(2) for what in ("model", "optim")],
        2,
        "dp2",
    ),
    "ours": ("shardforge", ["COMMITTED", *(f"rank-0000{n}.safetensors" for n in range(3))], 3, ""),
}


@pytest.mark.parametrize("case", RANKS)
def test_the_ranks_that_wrote_it_are_told_however_damaged_it_is(tmp_path, case):
    kind, files, ranks, layout = RANKS[case]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = inspect(tmp_path)
    assert (found.opened.kind, found.laid.ranks, found.layout) == (kind, ranks, layout)
    assert found.problems


def test_degrees_are_those_of_megatrons_arguments(trained, tmp_path):
    converted(trained, tmp_path / "out", to="megatron", layout={"tp": 2, "pp": 2})
    assert inspect(tmp_path / "out").layout == "tp2-pp2"


def test_the_layout_of_a_run_is_that_of_its_recipe(run, tmp_path):
    recipe = Path(shutil.copytree(run, tmp_path / "run")) / "recipe.yaml"
    document = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(document | {"parallel": {"tp": 2, "pp": 2}}))
    assert inspect(recipe.parent).layout == "pp2-tp2"


def test_a_torn_save_is_told_with_what_is_there(run, tmp_path):
    step = next((run / "checkpoints").iterdir())
    torn = Path(shutil.copytree(step, tmp_path / "step-00000009.tmp-0"))
    (torn / "COMMITTED").unlink()
    found = inspect(torn)
    assert "never committed" in told(found)
    assert found.opened.names["model.embed.weight"].shape == (32, 16)


def test_a_step_without_its_recipe_is_told_with_what_is_there(run, tmp_path):
    step = shutil.copytree(next((run / "checkpoints").iterdir()), tmp_path / "step-00000007")
    found = inspect(Path(step))
    assert "no recipe.yaml says what model" in told(found)
    assert "optim.embed.weight.exp_avg" in found.opened.names


def test_of_a_folder_with_a_file_cut_off_the_others_are_told(published, tmp_path):
    path = Path(shutil.copytree(published, tmp_path / "cut"))
    first, *others = sorted(path.glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 8)
    found = inspect(path)
    assert f"{first.name}: " in told(found) and "the file has" in told(found)
    kept = {name for file in others for name in tensorheader.header(file)}
    assert found.opened.names.keys() == kept and found.opened.source is None


def test_a_missing_file_is_told_with_what_is_there(published, tmp_path):
    path = Path(shutil.copytree(published, tmp_path / "cut"))
    sorted(path.glob("*.safetensors"))[0].unlink()
    found = inspect(path)
    assert "1 of 3 files of the index are missing" in told(found) and found.opened.names


def test_a_model_that_is_not_known_is_told_with_its_tensors(published, tmp_path):
    path = Path(shutil.copytree(published, tmp_path / "odd"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    found = inspect(path)
    assert "MambaForCausalLM" in told(found)
    assert "model.embed_tokens.weight" in found.opened.names and found.counts is None


def test_a_checkpoint_of_megatron_without_arguments_is_told_with_its_tensors(copied):
    path = copied("megatron")
    next(path.rglob("common.pt")).unlink()
    found = inspect(path)
    assert "arguments" in told(found) and "embedding.word_embeddings.weight" in found.opened.names


@pytest.mark.parametrize("to", ["megatron", "deepspeed"])
def test_a_file_of_pickles_that_is_cut_off_is_a_problem_not_a_crash(copied, to):
    path = copied(to)
    for file in path.rglob("*"):
        if file.suffix in (".pt", ".distcp") or file.name == ".metadata":
            os.truncate(file, file.stat().st_size // 2)
    found = inspect(path)
    assert found.problems and found.laid.files


def test_one_file_of_tensors_is_a_checkpoint_too(tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "adapter.safetensors")
    found = inspect(tmp_path / "adapter.safetensors")
    assert (found.opened.kind, found.problems, found.opened.names["a"].shape) == ("safetensors", (), (2, 3))


def test_a_folder_that_does_not_say_its_model_is_told_with_its_tensors(tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    found = inspect(tmp_path)
    assert "no config.json" in told(found) and found.opened.names["a"].shape == (2, 3)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_of_others_are_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"can run any code(.|\n)*save_pretrained"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match=r"can run any code"):
        inspect(tmp_path / name)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("x"), lambda path: None])
def test_what_is_no_checkpoint_is_refused_naming_all_kinds(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path / "x")
    assert all(kind.title in str(caught.value) for kind in KINDS)


LARGE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the large model's tensors, under the names of transformers."""
    h, f, kv = 2048, 8192, 512
    layer = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
    }
    found = {f"model.layers.{n}.{role}.weight": shape for n in range(6) for role, shape in layer.items()}
    top = {"model.embed_tokens.weight": (32000, h), "lm_head.weight": (32000, h), "model.norm.weight": (h,)}
    return found | top


def large(path: Path) -> Path:
    """2 GB of zeros that take no room on the disk."""
    table, end = {}, 0
    for name, shape in shapes().items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path / "model.safetensors", 8 + len(text) + end)
    (path / "config.json").write_text(json.dumps(LARGE))
    return path


def bytes_read() -> int:
    """By read calls of this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_less_than_a_hundredth_of_a_large_folder_is_read(tmp_path, published, monkeypatch):
    inspect(published)  # imports what it needs
    path = large(tmp_path)
    monkeypatch.setattr(tensorfile, "opened", lambda path: pytest.fail("mapped"))  # the system counts no mapped pages
    before = bytes_read()
    found = inspect(path)
    assert found.counts is not None and found.laid.bytes > 1 << 30
    assert bytes_read() - before < found.laid.bytes / 100


def test_no_file_of_a_run_is_mapped(run, monkeypatch):
    monkeypatch.setattr(tensorfile, "opened", lambda path: pytest.fail("mapped"))
    assert inspect(run).counts is not None


def test_the_settings_of_the_large_model_are_read_as_its_family_does(tmp_path):
    section = families()["LlamaForCausalLM"].model(Settings(LARGE, tmp_path))
    assert inspect(large(tmp_path)).model == whole(section, tmp_path)


def test_what_a_gguf_file_says_of_itself_is_told(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf writes the file")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_name("The Name")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy(), raw_dtype=None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(tmp_path / "x.gguf")
    assert found.laid.notes == ("name: The Name", "tensors as stored: 1 F32")
    assert "'mamba' is not one" in told(found) and found.opened.names["token_embd.weight"].shape == (4, 32)


def test_a_gguf_file_that_is_cut_off_is_told_with_its_size(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf reads the file")
    (tmp_path / "x.gguf").write_bytes(gguf_file.MAGIC + b"\x03\0\0\0")
    found = inspect(tmp_path / "x.gguf")
    assert "bytes are claimed" in told(found) and found.laid.files == {"x.gguf": 8}
