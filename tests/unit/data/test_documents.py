from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardforge.core.errors import DataError
from shardforge.data import sources
from shardforge.data.documents import Document, Invalid, parse, read
from shardforge.data.sources import plan

TEXTS = ["one", "zwei über", "three\nlines\n", "四"]


def everything(path: Path | str, field: str = "text") -> list[Document | Invalid]:
    return [document for part in plan([str(path)], field).parts for document in read(part)]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def zst(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(
        content[half:]
    )  # two frames, as parallel tools write


PACKED: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zst}


@pytest.mark.parametrize("ending", PACKED)
def test_every_compression_gives_the_same_texts_and_offsets(tmp_path: Path, ending: str):
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACKED[ending](json_lines(TEXTS)))
    found = everything(path)
    offsets = [0]
    for text in TEXTS[:-1]:
        offsets.append(offsets[-1] + len(json_lines([text])))
    assert found == [Document(f"a{ending}@{at}", text) for at, text in zip(offsets, TEXTS, strict=True)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=20), size=st.integers(1, 90)
)
def test_lines_come_once_wherever_the_file_is_cut(tmp_path: Path, texts: list[str], size: int):
    path = tmp_path / "a.jsonl"
    content = json_lines(texts)
    path.write_bytes(content[:-1])  # and without a newline at the end
    (whole,) = plan([str(path)]).parts
    cut = [replace(whole, start=at, stop=min(at + size, len(content) - 1)) for at in range(0, len(content) - 1, size)]
    assert [document for part in cut for document in read(part)] == list(read(whole))
    assert [document.text for document in read(whole)] == texts


def test_plain_lines_are_cut_inside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "SMALLEST", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS * 10))
    assert len(plan([str(path)]).parts) > 5
    assert [document.text for document in everything(path)] == TEXTS * 10


def test_row_groups_of_a_parquet_file_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(sources, "SMALLEST", 1)
    pq.write_table(pa.table({"body": TEXTS, "id": range(4)}), tmp_path / "a.parquet", row_group_size=1)
    assert len(plan([str(tmp_path / "a.parquet")], "body").parts) == 4
    assert everything(tmp_path / "a.parquet", "body") == [
        Document(f"a.parquet#{i}", text) for i, text in enumerate(TEXTS)
    ]


def test_a_dataset_saved_to_disk_is_read_by_rows(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    source = f"hf:{tmp_path / 'saved'}"
    assert everything(source) == [Document(f"{source}#{i}", text) for i, text in enumerate(TEXTS)]


def test_a_local_folder_of_files_is_streamed_as_a_dataset(tmp_path: Path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(json_lines(TEXTS))
    assert [document.text for document in everything(f"hf:{tmp_path / 'set'}")] == TEXTS


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"fine so far\xff")
    assert everything(tmp_path / "a.txt") == [Invalid("a.txt", "byte 11 (0xff) is not UTF-8")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not JSON"),
        (b"[1]", "a JSON list"),
        (b'{"body": "x"}', "'text' is missing"),
        (b'{"text": 3}', "'text' is int"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "byte 10 (0xff)"),
    ],
)
def test_a_line_that_holds_no_text_says_why(line: bytes, reason: str):
    found = parse("a@0", line, "text")
    assert isinstance(found, Invalid) and reason in found.reason


@pytest.mark.parametrize(("ending", "keep"), [(".jsonl.gz", -9), (".jsonl.gz", 0), (".jsonl.zst", 0)])
def test_a_damaged_archive_is_named(tmp_path: Path, ending: str, keep: int):
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACKED[ending](json_lines(TEXTS))[:keep] if keep else json_lines(TEXTS))
    with pytest.raises(DataError, match=r"a\.jsonl"):
        everything(path)
