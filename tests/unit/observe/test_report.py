from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.core.errors import DataError, Problems
from shardforge.observe.report import write

PNG = b"\x89PNG\r\n\x1a\n"


def test_report_and_picture_stand_in_the_first_run(tmp_path: Path, write_life):
    for name in ("a", "b"):
        write_life(tmp_path / name, [1, 2], name=name)
    written = write([tmp_path / "a", tmp_path / "b"])
    assert written == (tmp_path / "a" / "report.html", tmp_path / "a" / "loss.png")
    assert written[1].read_bytes().startswith(PNG) and not (tmp_path / "b" / "report.html").exists()


def test_an_output_takes_the_picture_beside_it(tmp_path: Path, write_life):
    write_life(tmp_path / "a", [1, 2])
    written = write([tmp_path / "a"], tmp_path / "new" / "both.html")
    assert written == (tmp_path / "new" / "both.html", tmp_path / "new" / "both.png")
    assert all(path.stat().st_size > 10_000 for path in written)


def test_the_report_shows_recipe_provenance_and_samples(tmp_path: Path, write_life):
    write_life(tmp_path, [1, 2])
    (tmp_path / "recipe.yaml").write_text("schedule: {kind: wsd_of_this_test}\n")
    (tmp_path / "provenance.json").write_text('[{"commit": "commit_of_this_test"}]')
    (tmp_path / "samples.txt").write_text("sample_of_this_test")
    text = write([tmp_path])[0].read_text()
    parts = ("wsd_of_this_test", "commit_of_this_test", "sample_of_this_test")
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "empty"])
def test_a_folder_that_is_no_run_is_refused_with_a_fix(tmp_path: Path, make):
    make(tmp_path / "x")
    with pytest.raises(DataError) as caught:
        write([tmp_path / "x"])
    assert caught.value.where == str(tmp_path / "x") and caught.value.fix


def test_all_wrong_folders_are_named_at_once(tmp_path: Path, write_life):
    write_life(tmp_path / "a", [1])
    with pytest.raises(Problems) as caught:
        write([tmp_path / "x", tmp_path / "a", tmp_path / "y"])
    assert [Path(problem.where).name for problem in caught.value.problems] == ["x", "y"]


def test_a_mixture_has_a_picture_of_its_experts_beside(tmp_path: Path, write_life, write_mixture):
    write_life(tmp_path / "dense", [1, 2])
    write_mixture(tmp_path / "sparse", [1, 2])
    made = write([tmp_path / "dense", tmp_path / "sparse"])[2]
    assert made == tmp_path / "dense" / "experts.png" and made.read_bytes().startswith(PNG)


def test_an_output_takes_the_picture_of_experts_beside_it(tmp_path: Path, write_mixture):
    write_mixture(tmp_path / "sparse", [1, 2])
    assert write([tmp_path / "sparse"], tmp_path / "new" / "one.html")[2] == tmp_path / "new" / "one-experts.png"
