"""GGUF files that lie: each is refused with a reason before anything as large as it claims is made."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardforge.core.errors import ForgeError
from shardforge.families.gguf_file import GgufFile

gguf = pytest.importorskip("gguf", reason="the package gguf knows the types")


def header(tensors: int = 0, settings: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, settings) + rest


def text(value: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if claimed is None else claimed) + value


def tensor(name: bytes = b"a", shape: tuple[int, ...] = (8,), kind: int = 0, begin: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, begin)


LIES: dict[str, tuple[bytes, str]] = {
    "cut off": (b"GGUF\x03", r"byte 4: 4 bytes are claimed, and the file ends 1 bytes behind"),
    "version 9": (header(version=9), r"GGUF version 9"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"GGUF version 50331648"),
    "tensors without end": (header(tensors=1 << 60), r"1152921504606846976 tensors are claimed"),
    "settings without end": (header(settings=1 << 60), r"1152921504606846976 settings are claimed"),
    "a text without end": (header(0, 1, text(b"", 1 << 60) + bytes(64)), r"a text of 1152921504606846976 bytes"),
    "a list without end": (
        header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60) + bytes(64)),
        r"1152921504606846976 numbers are claimed",
    ),
    "texts without end": (
        header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(64)),
        r"1152921504606846976 texts are claimed",
    ),
    "a list of lists": (header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), r"type 9, which is none"),
    "an unknown type of setting": (header(0, 1, text(b"a") + struct.pack("<I", 77) + bytes(64)), r"type 77"),
    "a setting twice": (header(0, 2, (text(b"ab") + struct.pack("<II", 4, 1)) * 2), r"'ab' stands there twice"),
    "a name that is no text": (header(0, 1, text(b"\xff") + bytes(64)), r"a text is no UTF-8"),
    "a name with a control sequence": (header(1, 0, tensor(b"\x1b[2J") + bytes(64)), r"the name '\\x1b\[2J'"),
    "a tensor twice": (header(2, 0, tensor() + tensor(begin=32) + bytes(128)), r"'a' stands there 2 times"),
    "five dimensions": (header(1, 0, tensor(shape=(1,) * 5) + bytes(64)), r"'a' has 5 dimensions"),
    "no dimension": (header(1, 0, tensor(shape=()) + bytes(64)), r"'a' \[\] cannot be F32"),
    "no numbers": (header(1, 0, tensor(shape=(0,)) + bytes(64)), r"'a' \[0\] cannot be F32"),
    "an unknown type": (header(1, 0, tensor(kind=999) + bytes(64)), r"'a' has type 999"),
    "a block cut in two": (header(1, 0, tensor(shape=(33,), kind=8) + bytes(64)), r"'a' \[33\] cannot be Q8_0"),
    "sizes whose product overflows": (header(1, 0, tensor(shape=(1 << 62,) * 4) + bytes(64)), r"a ends at byte"),
    "an end behind the file": (header(1, 0, tensor(shape=(64,)) + bytes(64)), r"a ends at byte 320, the file has"),
    "a place between": (header(1, 0, tensor(begin=4) + bytes(128)), r"a begins at 68, no multiple of 32"),
    "tensors in one another": (
        header(2, 0, tensor(shape=(16,)) + tensor(b"b", begin=32) + bytes(256)),
        r"b begins inside",
    ),
    "a part of several": (
        header(0, 1, text(b"split.count") + struct.pack("<IH", 2, 3) + bytes(64)),
        r"one of 3 files of a model",
    ),
    "an odd alignment": (
        header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 12) + bytes(64)),
        r"general.alignment=12 is no power of two",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_lies_is_refused_with_the_reason(tmp_path, case):
    content, reason = LIES[case]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ForgeError, match=reason):
        GgufFile(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("a.weight", torch.ones(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@given(
    where=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 400) | st.just(0),
)
@settings(max_examples=300, deadline=None)
def test_no_damage_of_a_file_is_anything_but_a_clear_error_or_sound(sound, where, cut):
    raw = bytearray(sound.read_bytes())
    for place, byte in where:
        raw[place] = byte
    file = sound.with_name("changed.gguf")
    file.write_bytes(bytes(raw[: len(raw) - cut]))
    try:
        read = GgufFile(file)
        assert all(read.read(name).shape == info.shape for name, info in read.names.items())
    except ForgeError:
        return
