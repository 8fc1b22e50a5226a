"""Which kind of checkpoint lies at a path, by its files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.core.errors import CheckpointError
from shardforge.families.gguf_file import MAGIC
from shardforge.families.open import KINDS, open_source, recognised

FOLDERS: dict[str, tuple[str, list[str], str]] = {
    "a run": ("shardforge", ["recipe.yaml", "checkpoints/step-00000007/COMMITTED"], "checkpoints/step-00000007"),
    "the newest step of a run": (
        "shardforge",
        [f"checkpoints/step-0000000{step}/COMMITTED" for step in (3, 9)],
        "checkpoints/step-00000009",
    ),
    "a step": ("shardforge", ["COMMITTED"], "."),
    "a folder of Hugging Face": ("huggingface", ["config.json", "model.safetensors"], "."),
    "one with pickles, which are refused later": ("huggingface", ["config.json", "pytorch_model.bin"], "."),
    "torch_dist": ("megatron", [".metadata", "__0_0.distcp"], "."),
    "the folder above it": (
        "megatron",
        ["latest_checkpointed_iteration.txt", "iter_0000012/.metadata"],
        "iter_0000012",
    ),
    "ranks of Megatron": ("megatron", ["mp_rank_00/model_optim_rng.pt"], "."),
    "partitions of DeepSpeed": ("deepspeed", ["mp_rank_00_model_states.pt"], "."),
    "the latest of DeepSpeed": ("deepspeed", ["latest", "12/mp_rank_00_model_states.pt"], "12"),
    "DeepSpeed with the model's config.json": (
        "deepspeed",
        ["config.json", "latest", "12/mp_rank_00_model_states.pt"],
        "12",
    ),
    "what Hugging Face's trainer leaves with DeepSpeed": (
        "huggingface",
        ["config.json", "model.safetensors", "latest", "12/mp_rank_00_model_states.pt"],
        ".",
    ),
    "a folder with one GGUF file": ("gguf", ["README.md", "model.gguf"], "model.gguf"),
}


def fill(path: Path, files: list[str]) -> Path:
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"12\n")
    return path


@pytest.mark.parametrize("case", FOLDERS)
def test_a_kind_is_recognised_by_its_files(tmp_path, case):
    name, files, opened = FOLDERS[case]
    kind, found = recognised(fill(tmp_path, files))
    assert (kind.name, found) == (name, tmp_path / opened)


def test_a_gguf_file_is_recognised_by_its_first_bytes_whatever_its_name(tmp_path):
    (tmp_path / "model.bin").write_bytes(MAGIC + bytes(20))
    assert recognised(tmp_path / "model.bin")[0].name == "gguf"


UNKNOWN: dict[str, tuple[list[str], str, str]] = {
    "nothing": ([], "", r"no weights are recognised here(.|\n)*Hugging Face: (.|\n)*GGUF: "),
    "pickles": (["pytorch_model.bin"], "", r"weights are pickled \(pytorch_model.bin\), and a pickle can run any code"),
    "a pickle": (["model.pth"], "model.pth", r"weights are pickled \(model.pth\)"),
    "tensors of an unknown model": (["a.safetensors"], "", r"no config.json beside a.safetensors"),
    "one file of tensors": (["a.safetensors"], "a.safetensors", r"one file of tensors(.|\n)*name its folder"),
    "another file": (["notes.txt"], "notes.txt", r"no weights are recognised in this file"),
    "nothing at all": ([], "no", r"there is nothing here"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_of_no_kind_is_refused_with_what_to_do(tmp_path, case):
    files, place, reason = UNKNOWN[case]
    with pytest.raises(CheckpointError, match=reason):
        open_source(fill(tmp_path, files) / place)


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.name != "deepspeed"])
def test_a_config_is_for_folders_that_do_not_say_their_model(tmp_path, name):
    files = next(files for kind, files, _ in FOLDERS.values() if kind == name)
    with pytest.raises(CheckpointError, match=r"--config .*says itself what model it is"):
        open_source(fill(tmp_path, files), tmp_path / "config.json")
