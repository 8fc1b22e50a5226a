"""Files of tensors that lie: each is refused with a reason before anything as large as it claims is made."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from shardforge.checkpoint import tensorfile, tensorheader
from shardforge.core.errors import CheckpointError, DataError, ForgeError, Problems
from shardforge.families import tensorfolder
from shardforge.families.tensorfolder import INDEX, WHOLE, TensorFolder, read_json

TWO = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def written(path: Path, header: bytes, numbers: int = 8, claimed: int | None = None) -> Path:
    length = len(header) if claimed is None else claimed
    path.write_bytes(struct.pack("<Q", length) + header + bytes(numbers))
    return path


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def table(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def twice(name: str) -> bytes:
    one = json.dumps(entry())
    return f'{{"{name}": {one}, "{name}": {one}}}'.encode()


HEADERS: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "empty file": (b"", {"numbers": 0, "claimed": 0}, r"expected|cannot be read as JSON"),
    "length beyond the file": (b"{}", {"claimed": 1 << 62}, r"claims 4611686018427387904 bytes, the file has 18"),
    "length of all bits": (b"{}", {"claimed": (1 << 64) - 1}, r"claims 18446744073709551615 bytes"),
    "no JSON": (b"{]", {}, r"cannot be read as JSON"),
    "no UTF-8": (b'{"\xff": 1}', {}, r"cannot be read as JSON"),
    "a list": (b"[]", {}, r"expected a JSON table, got a list"),
    "nested too deep": (b'{"a":' * 20000, {}, r"cannot be read as JSON"),
    "a name twice": (twice("a"), {}, r"'a' stands there twice"),
    "a field twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', {}, r"'dtype' stands there twice"),
    "an entry that is none": (table(a=3), {}, r"'a': its entry is not one of"),
    "a field more": (table(a=entry() | {"x": 1}), {}, r"'a': its entry is not one of"),
    "an unknown type": (table(a=entry(dtype="F99")), {}, r"'a': its type is 'F99', known are"),
    "a type that is a list": (table(a=entry(dtype=[])), {}, r"'a': its type is \[\]"),
    "a negative size": (table(a=entry(shape=[-2])), {}, r"shape \[-2\]"),
    "a fraction of a size": (table(a=entry(shape=[2.0])), {}, r"shape \[2\.0\]"),
    "true for one": (table(a=entry(end=4, shape=[True])), {"numbers": 4}, r"shape \[True\]"),
    "a size beyond 64 bits": (table(a=entry(shape=[1 << 64])), {}, r"are not 64 and 2 whole numbers"),
    "65 dimensions": (table(a=entry(end=4, shape=[1] * 65)), {"numbers": 4}, r"are not 64 and 2 whole numbers"),
    "sizes whose product overflows": (table(a=entry(shape=[1 << 62] * 4)), {}, r"'a': F32\[4611"),
    "a shape unlike its bytes": (table(a=entry(shape=[3])), {}, r"'a': F32\[3\] has 12 bytes, .* hold 8"),
    "an end before the beginning": (table(a=entry(8, 0)), {}, r"'a': F32\[2\] has 8 bytes"),
    "overlapping tensors": (table(a=entry(), b=entry(4, 12)), {"numbers": 12}, r"b begins at 4, inside of a"),
    "the same bytes twice": (table(a=entry(), b=entry()), {}, r"b begins at 0, inside of a"),
    "a hole": (table(a=entry(), b=entry(16, 24)), {"numbers": 24}, r"b begins at 16, 8 bytes behind the end of a"),
    "a hole at the beginning": (table(a=entry(8, 16)), {"numbers": 16}, r"a begins at 8, 8 bytes behind"),
    "a file that is cut off": (table(a=entry()), {"numbers": 7}, r"a ends at byte 8 of the numbers, the file has 7"),
    "a file with more behind": (table(a=entry()), {"numbers": 9}, r"a ends at byte 8 of the numbers, the file has 9"),
    "a name with a control sequence": (table(**{"a\x1b[2J": entry()}), {}, r"'a\\x1b\[2J': its name"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused_with_the_reason(tmp_path, case):
    header, how, reason = HEADERS[case]
    file = written(tmp_path / "x.safetensors", header, **how)
    with pytest.raises(CheckpointError, match=reason), tensorfile.opened(file):
        pass


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", tensorheader.LIMIT + 1))
    os.truncate(file, tensorheader.LIMIT + 100)  # sparse: nothing is on the disk
    with pytest.raises(CheckpointError, match=rf"and {tensorheader.LIMIT} are the most"):
        tensorheader.header(file)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        tensorheader.header(tmp_path / "x.safetensors")


def test_a_file_that_was_changed_is_checked_again(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(TWO, file)
    tensorheader.header(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends at byte"):
        tensorheader.header(file)


@pytest.mark.parametrize("dtype", [kind for kind, _ in tensorfile.TYPES.values()], ids=str)
def test_what_safetensors_writes_is_sound(tmp_path, dtype):
    what = {"x": torch.zeros(3, 5).to(dtype), "none": torch.zeros(0, 4).to(dtype), "one": torch.tensor(1).to(dtype)}
    save_file(what, tmp_path / "x.safetensors", {"format": "pt"})
    found = tensorheader.header(tmp_path / "x.safetensors")
    assert {name: slot.shape for name, slot in found.items()} == {"x": (3, 5), "none": (0, 4), "one": ()}


def folder(path: Path, **where: str) -> Path:
    """Tensors a and b in two files, with an index that says `where` they are."""
    for name, tensor in TWO.items():
        save_file({name: tensor}, path / f"{name}.safetensors")
    table = {"a": "a.safetensors", "b": "b.safetensors"} | where
    (path / INDEX).write_text(json.dumps({"weight_map": table}))
    return path


def test_a_folder_that_tells_the_truth_is_read(tmp_path):
    read = TensorFolder(folder(tmp_path))
    assert all(torch.equal(read.read(name), tensor) for name, tensor in TWO.items())


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..", "", "a.bin", "./a.safetensors"]
)
def test_an_index_names_files_of_its_folder_alone(tmp_path, file):
    with pytest.raises(CheckpointError, match=r"is not a file of this folder"):
        TensorFolder(folder(tmp_path, a=file))


def test_an_index_that_puts_a_tensor_into_another_file_is_told(tmp_path):
    with pytest.raises(Problems, match=r"index says a is in b.safetensors, it is in a.safetensors"):
        TensorFolder(folder(tmp_path, a="b.safetensors", other="a.safetensors", **{"b": "b.safetensors"}))


def test_an_index_with_a_tensor_that_is_in_no_file_is_told(tmp_path):
    with pytest.raises(Problems, match=r"index says c is in a.safetensors, it is in none"):
        TensorFolder(folder(tmp_path, c="a.safetensors"))


def test_a_tensor_in_two_files_is_told(tmp_path):
    folder(tmp_path)
    save_file(TWO, tmp_path / "b.safetensors")
    with pytest.raises(Problems, match=r"a is in a.safetensors too"):
        TensorFolder(tmp_path)


INDICES: dict[str, tuple[str, type[ForgeError], str]] = {
    "no JSON": ("{", DataError, r"cannot be read as JSON"),
    "a list": ("[]", DataError, r"expected a JSON table"),
    "no table": ("{}", CheckpointError, r"no table weight_map"),
    "an empty table": ('{"weight_map": {}}', CheckpointError, r"no table weight_map"),
    "a number for a file": ('{"weight_map": {"a": 3}}', CheckpointError, r"no table weight_map"),
    "a tensor twice": (
        '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        DataError,
        r"'a' stands there twice",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_is_none_is_refused(tmp_path, case):
    text, kind, reason = INDICES[case]
    (folder(tmp_path) / INDEX).write_text(text)
    with pytest.raises(kind, match=reason):
        TensorFolder(tmp_path)


def test_a_file_without_tensors_is_no_model(tmp_path):
    written(tmp_path / WHOLE, b"{}", numbers=0)
    with pytest.raises(Problems, match=r"hold no tensor at all"):
        TensorFolder(tmp_path)


def test_all_files_that_are_damaged_are_told_at_once(tmp_path):
    for name in "ab":
        file = folder(tmp_path) / f"{name}.safetensors"
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Problems) as caught:
        TensorFolder(tmp_path)
    assert [Path(error.where).name for error in caught.value.problems] == ["a.safetensors", "b.safetensors"]


def cached(path: Path) -> Path:
    """As huggingface_hub keeps downloads."""
    snapshot, blobs = path / "snapshots" / "rev", path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TWO, blobs / "0123")
    (snapshot / WHOLE).symlink_to("../../blobs/0123")
    return snapshot


def inside(path: Path) -> Path:
    save_file(TWO, path / "real.bin")
    (path / WHOLE).symlink_to("real.bin")
    return path


@pytest.mark.parametrize("make", [cached, inside])
def test_links_that_stay_inside_are_followed(tmp_path, make: Callable[[Path], Path]):
    assert TensorFolder(make(tmp_path)).names.keys() == TWO.keys()


def test_a_link_to_the_folder_itself_is_followed(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    save_file(TWO, real / WHOLE)
    (tmp_path / "link").symlink_to(real)
    assert TensorFolder(tmp_path / "link").names.keys() == TWO.keys()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_link_out_of_the_folder_is_refused(tmp_path, indexed):
    here = tmp_path / "here"
    here.mkdir()
    save_file(TWO, tmp_path / "secret.safetensors")
    name = "a.safetensors" if indexed else WHOLE
    if indexed:
        folder(here)
        (here / name).unlink()
    (here / name).symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match=r"link out of its folder, to .*secret.safetensors"):
        TensorFolder(here)


def test_settings_beyond_the_limit_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfolder, "JSON_BYTES", 10)
    (tmp_path / "config.json").write_text('{"a": "0123456789"}')
    with pytest.raises(DataError, match=r"more than the 10"):
        read_json(tmp_path / "config.json")


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8)


def changed(content: bytes, where: list[tuple[int, int]], cut: int) -> bytes:
    """Some bytes of a file replaced, and some at its end left away."""
    raw = bytearray(content)
    for place, byte in where:
        raw[place % len(raw)] = byte
    return bytes(raw[: len(raw) - cut % len(raw)])


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "x.safetensors"
    save_file(TWO, path)
    return path


@given(where=CHANGES, cut=st.integers(0, 200) | st.just(0))
@settings(max_examples=300, deadline=None)
def test_no_damage_of_a_file_is_anything_but_a_clear_error_or_sound(sound, where, cut):
    file = sound.with_name("changed.safetensors")
    file.write_bytes(changed(sound.read_bytes(), where, cut))
    try:
        found = tensorheader._header.__wrapped__(file, file.stat().st_size, 0, 0)  # the time of a change may not differ
    except CheckpointError:
        return
    assert sum(slot.end - slot.begin for slot in found.values()) < file.stat().st_size
    with safe_open(str(file), "pt") as opened:  # what passes here, the library that maps the numbers takes too
        assert set(opened.keys()) == found.keys()
