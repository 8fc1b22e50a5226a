from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardforge.core.errors import DataError
from shardforge.data.shards import HEAD, MAGIC, NamesReader, ShardReader, ShardWriter, beside, token_type, write_names


def written(prefix: Path, lengths: list[int], dtype: str = "uint16") -> ShardReader:
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for number, length in enumerate(lengths):
            writer.add(np.full(length, number + 1))
        writer.close()
    return ShardReader(prefix)


@pytest.mark.parametrize(("vocab", "expected"), [(256, "uint16"), (65_499, "uint16"), (65_500, "int32")])
def test_tokens_are_stored_as_megatron_stores_them(vocab: int, expected: str):
    assert token_type(vocab).name == expected


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_what_is_written_is_read(tmp_path: Path, dtype: str, lengths: list[int]):
    reader = written(tmp_path / "shard", lengths, dtype)
    reader.check()
    assert [reader.document(number).tolist() for number in range(reader.documents)] == [
        [number + 1] * length for number, length in enumerate(lengths)
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_every_token_finds_its_document(tmp_path: Path, lengths: list[int]):
    reader = written(tmp_path / "shard", lengths)
    assert [reader.find(token) + 1 for token in range(reader.tokens)] == reader.content.tolist()


def test_a_dot_in_the_name_stays(tmp_path: Path):
    written(tmp_path / "v1.5", [2])
    assert (tmp_path / "v1.5.bin").is_file()


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "shard", np.dtype("uint16")) as writer:
        writer.add(np.arange(3))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def tear(suffix: str, keep: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = beside(prefix, suffix)
        path.write_bytes(path.read_bytes()[:keep])

    return change


def patch(suffix: str, at: int, content: bytes) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = beside(prefix, suffix)
        old = path.read_bytes()
        path.write_bytes(old[:at] + content + old[at + len(content) :])

    return change


# three documents of 4, 5 and 6 uint16 tokens: 30 bytes, and an index of 34 + 12 * 3 + 8 * 4 = 102
DAMAGE = {
    "torn tokens": (tear(".bin", 29), ["shard.bin", "truncated", "29", "30"]),
    "no tokens": (tear(".bin", 0), ["shard.bin", "truncated", "0 bytes", "30"]),
    "torn index": (tear(".idx", 101), ["shard.idx", "truncated", "101", "102"]),
    "torn head": (tear(".idx", 20), ["shard.idx", "truncated", "20", "34"]),
    "empty index": (tear(".idx", 0), ["shard.idx", "truncated", "0 bytes", "34"]),
    "foreign index": (patch(".idx", 0, b"PK"), ["shard.idx", "PK", "MMIDIDX"]),
    "later version": (patch(".idx", 9, b"\x02"), ["shard.idx", "version 2", "version 1"]),
    "floats": (patch(".idx", 17, b"\x06"), ["shard.idx", "type code 6"]),
    "fewer sequences": (patch(".idx", 18, b"\x02"), ["shard.idx", "too long", "102", "90"]),
    "wrong length": (patch(".idx", HEAD.size + 8, b"\x07"), ["shard.bin", "truncated", "30", "32"]),
    "wrong documents": (patch(".idx", 94, b"\x02"), ["shard.idx", "0 to 2", "0 to 3"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_what_was_found_and_expected(tmp_path: Path, damage: str):
    written(tmp_path / "shard", [4, 5, 6])
    change, words = DAMAGE[damage]
    change(tmp_path / "shard")
    with pytest.raises(DataError) as error:
        ShardReader(tmp_path / "shard")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.fix


def test_a_missing_file_is_named(tmp_path: Path):
    written(tmp_path / "shard", [4])
    (tmp_path / "shard.bin").unlink()
    with pytest.raises(DataError, match=r"shard\.bin"):
        ShardReader(tmp_path / "shard")


@pytest.mark.parametrize("at", [HEAD.size + 4, HEAD.size + 12 + 8])
def test_check_finds_a_length_or_offset_that_disagrees_in_the_middle(tmp_path: Path, at: int):
    written(tmp_path / "shard", [4, 5, 6])
    patch(".idx", at, b"\x01")(tmp_path / "shard")
    with pytest.raises(DataError, match="disagree"):
        ShardReader(tmp_path / "shard").check()


def test_check_finds_documents_out_of_order(tmp_path: Path):
    written(tmp_path / "shard", [4, 5, 6])
    patch(".idx", HEAD.size + 36 + 8, b"\x03")(tmp_path / "shard")
    with pytest.raises(DataError, match="begins before"):
        ShardReader(tmp_path / "shard").check()


def test_a_document_longer_than_the_format_allows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shardforge.data.shards.LONGEST", 5)
    with pytest.raises(DataError, match="6 tokens"), ShardWriter(tmp_path / "shard", np.dtype("uint16")) as writer:
        writer.add(np.arange(6))


def test_names_come_back_in_any_order(tmp_path: Path):
    names = ["a", "", "später/文.txt"]
    write_names(tmp_path / "x.names", [name.encode() for name in names])
    reader = NamesReader(tmp_path / "x.names")
    assert [reader[number] for number in (2, 0, 1)] == [names[2], names[0], names[1]]


@pytest.mark.parametrize("keep", [5, 20, 50])
def test_a_torn_list_of_names_is_refused(tmp_path: Path, keep: int):
    path = tmp_path / "x.names"
    write_names(path, [b"some name", b"another name"])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.names"):
        NamesReader(path)


def test_the_header_is_megatrons():
    assert MAGIC == b"MMIDIDX\x00\x00" and HEAD.size == 34
