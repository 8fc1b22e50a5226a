from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardforge.cli.main import main

START = {
    "event": "start", "time": 0.0, "name": "first", "layout": "one", "world_size": 1, "weights": 10, "steps": 3,
    "first_step": 0,
}  # fmt: skip


def test_it_prints_where_report_and_picture_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(START) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    printed = [Path(line.split(maxsplit=1)[1]) for line in capsys.readouterr().out.splitlines()]
    assert printed == [tmp_path / "report.html", tmp_path / "loss.png"] and all(path.is_file() for path in printed)


def test_a_folder_that_is_no_run_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}  this is not a run directory")
