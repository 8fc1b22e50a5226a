from __future__ import annotations

import hashlib
import json

import pytest

from shardforge.checkpoint import tensorfile
from shardforge.convert import certificate
from shardforge.convert.format import Options
from shardforge.convert.plan import design
from shardforge.core.errors import CheckpointError
from shardforge.families.forms import SAME, TURNED, Chain, Padded, QueryGroups, Reversed, Rows, Stacked
from shardforge.families.open import open_source
from tests.unit.convert.folders import converted


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return converted(run, tmp_path_factory.mktemp("made") / "hf", shard_bytes=8000, dtype="bf16")


@pytest.fixture
def told(made):
    return certificate.read(made.path)


def test_every_file_of_the_result_is_there_with_its_hash(made, told):
    files = {file.name for file in made.path.iterdir()} - {certificate.NAME}
    assert told["target"]["files"].keys() == files
    for name, file in told["target"]["files"].items():
        assert file["bytes"] == (made.path / name).stat().st_size
        assert tensorfile.as_written(made.path / name, file["sha256"])
        assert file["sha256"].startswith("tree:") == name.endswith(".safetensors")


def test_every_tensor_has_the_hash_of_its_bytes_as_they_lie_in_the_file(made, told):
    from safetensors import safe_open

    found = {}
    for path in made.path.glob("*.safetensors"):
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(start - 8))
            for key, slot in head.items():
                if key != "__metadata__":
                    begin, end = slot["data_offsets"]
                    file.seek(start + begin)
                    found[path.name, key] = hashlib.sha256(file.read(end - begin)).hexdigest()
        with safe_open(str(path), "pt") as opened:
            assert set(opened.keys()) == {key for name, key in found if name == path.name}
    assert found == {(each["file"], each["key"]): each["sha256"] for each in told["tensors"]}


def test_every_weight_has_the_hash_of_its_numbers_in_the_source(run, told):
    source = open_source(run)
    hashes = {f"model.{name}": hashlib.sha256(source.read(name).numpy().tobytes()).hexdigest() for name in source.names}
    assert {name: each["sha256"] for name, each in told["weights"].items()} == hashes


def test_casts_and_renames_are_counted(told):
    count = len(told["tensors"])
    same = 1  # model.norm.weight is called so here and there
    assert told["changes"] == {"renamed": count - same, "cast float32 to bfloat16": count}


def test_names_and_forms_of_a_published_source_are_told(published, tmp_path):
    weights = converted(published, tmp_path / "ours", "shardforge").certificate["weights"]
    assert weights["model.blocks.0.mixer.q.weight"]["from"] == ["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    "form, theirs, ours",
    [
        (SAME, [], []),
        (Chain((Stacked(), TURNED)), ["transposed", "split by expert"], ["stacked", "transposed"]),
        (Chain((Padded(3, 8), Rows(2))), ["joined", "padded"], ["cut to size", "cut apart"]),
        (QueryGroups(2, 4), ["joined by group"], ["cut apart by group"]),
        (Reversed(Chain((Stacked(), TURNED))), ["stacked", "transposed"], ["transposed", "split by expert"]),
    ],
    ids=["same", "experts", "padded rows", "groups", "reversed"],
)
def test_a_form_is_told_in_the_order_in_which_it_works(form, theirs, ours):
    assert certificate.words(form) == theirs and certificate.words(form, "ours") == ours


def test_a_weight_that_was_two_different_ones_is_an_error(run, made):
    source = open_source(run)
    options = Options(to="huggingface", dtype="bf16", shard_bytes=8000)
    writer = design(source, options)
    names = {item.key: "" for file in writer.files for item in file.items}
    record = {"tensors": names, "odd": {}, "files": []}
    records = [{**record, "weights": {"model.a": str(number)}} for number in range(len(writer.files))]
    with pytest.raises(CheckpointError, match="changed while it was read"):
        certificate.collect(source, writer, records, made.path, options)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_file_that_is_no_certificate_is_told(tmp_path, content):
    (tmp_path / certificate.NAME).write_text(content)
    with pytest.raises(CheckpointError, match="certificate"):
        certificate.read(tmp_path)


def test_a_folder_without_one_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no certificate"):
        certificate.read(tmp_path)
