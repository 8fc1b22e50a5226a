from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.core.errors import DataError, Problems
from shardforge.data import sources
from shardforge.data.sources import plan


def names(path: Path | str, **options: object) -> list[str]:
    return [name for part in plan([str(path)], **options).parts for name in part.names]


def test_a_folder_is_read_in_sorted_order_whatever_the_disk_says(tmp_path: Path):
    for name in ("b.txt", "a/z.md", "a.py", "a/.hidden/x.txt", "a/__pycache__/y.py", ".git.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert names(tmp_path) == [f"{tmp_path.name}/{name}" for name in ("a.py", "a/z.md", "b.txt")]


def test_files_of_unknown_kind_are_counted_not_read(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    planned = plan([str(tmp_path)])
    assert planned.ignored == 1 and [part.names for part in planned.parts] == [(f"{tmp_path.name}/a.txt",)]


def test_a_named_file_is_read_whatever_its_ending(tmp_path: Path):
    (tmp_path / "LICENSE").write_text("x")
    assert names(tmp_path / "LICENSE") == ["LICENSE"]


def test_the_output_folder_is_never_an_input(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert names(tmp_path, output=tmp_path / "out") == [f"{tmp_path.name}/a.txt"]


def test_small_files_share_a_part_and_large_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "SMALLEST", 100)
    for number, size in enumerate((40, 60, 10, 500, 90)):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    assert [len(part.names) for part in plan([str(tmp_path)]).parts] == [2, 1, 1, 1]


def test_a_changed_file_changes_the_identity_of_its_part(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = plan([str(path)]).parts[0].identity()
    path.write_text("other")
    assert plan([str(path)]).parts[0].identity() != before


def test_the_standard_library_is_its_python_files_by_relative_name():
    found = names("stdlib")
    assert "json/decoder.py" in found and found == sorted(found)
    assert all(name.endswith(".py") and "site-packages" not in name for name in found)


def test_only_the_standard_library_may_hold_invalid_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    assert {part.lenient for part in plan(["stdlib"]).parts} == {True}
    assert {part.lenient for part in plan([str(tmp_path)]).parts} == {False}


def test_all_inputs_that_are_not_there_are_reported_together(tmp_path: Path):
    with pytest.raises(Problems) as error:
        plan([str(tmp_path / "x"), str(tmp_path), str(tmp_path / "y")])
    assert [Path(problem.where).name for problem in error.value.problems] == ["x", "y"]


def test_an_unknown_option_of_a_dataset_is_named():
    with pytest.raises(DataError, match="'confg'"):
        plan(["hf:some/name?confg=a"])


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as error:
        plan([str(tmp_path / "a.parquet")])
    assert "body, id" in error.value.fix


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a\.parquet"):
        plan([str(tmp_path / "a.parquet")])
