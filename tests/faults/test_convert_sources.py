"""Sources that are damaged or lie: a clear error, and no folder that looks whole."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardforge.core.errors import ForgeError
from tests.faults import runs
from tests.unit.convert.folders import converted
from tests.unit.upcycle import dense

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    converted(dense.save(path / "run"), path / "hf", shard_bytes=6000)
    (path / "hf" / "conversion.json").unlink()
    return path / "hf"


@pytest.fixture
def copy(published, tmp_path):
    (tmp_path / "hf").mkdir()
    for file in published.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "hf"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def cut(folder):
    """The last file ends in the middle of its numbers."""
    os.truncate(shards(folder)[-1], shards(folder)[-1].stat().st_size - 100)


def missing(folder):
    shards(folder)[0].unlink()


def lying(folder):
    """A weight is not of the shape that config.json says."""
    path = shards(folder)[0]
    state = load_file(path)
    name = next(name for name, tensor in state.items() if tensor.dim() == 2)
    save_file(state | {name: torch.zeros(3, 4)}, path, {"format": "pt"})


def elsewhere(folder):
    """The index names a file outside of the folder."""
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 33}))


def unsupported(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))


DAMAGE = {
    cut: "model-0000",
    missing: "model-00001",
    lying: r"\[3, 4\]",
    elsewhere: "model.safetensors",
    vocabulary: "33",
    unsupported: "quantization_config",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__)
def test_a_damaged_source_is_a_clear_error_and_leaves_no_target(copy, tmp_path, damage):
    damage(copy)
    with pytest.raises(ForgeError, match=DAMAGE[damage]):
        converted(copy, tmp_path / "ours", "shardforge")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_command_says_it_with_code_2(copy, tmp_path):
    vocabulary(copy)
    ended = runs.run(tmp_path, "convert", str(copy), str(tmp_path / "ours"), "--to", "shardforge")
    assert ended.code == 2 and "[33, 16]" in ended.err
    assert not (tmp_path / "ours").exists()


def test_a_file_cut_while_it_is_read_is_an_error_and_no_target(copy, tmp_path, monkeypatch):
    from shardforge.convert import pieces

    real = pieces.Pieces.make

    def make(self, item):
        if shards(copy)[-1].stat().st_size > 100:
            os.truncate(shards(copy)[-1], 100)
        return real(self, item)

    monkeypatch.setattr(pieces.Pieces, "make", make)
    with pytest.raises(ForgeError):
        converted(copy, tmp_path / "ours", "shardforge")
    assert not (tmp_path / "ours").exists()
