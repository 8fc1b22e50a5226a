from __future__ import annotations

import hashlib

import pytest
import torch

from shardforge.checkpoint.journal import Journal, one_thread


@pytest.fixture
def journal(tmp_path):
    """One whose job 3 has written "hello" into files/deep/a."""
    made = Journal(tmp_path, tmp_path / "files")
    (made.files / "deep").mkdir(parents=True)
    (made.files / "deep" / "a").write_bytes(b"hello")
    made.write(3, {"files": [{"file": "deep/a", "bytes": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}], "x": 1})
    return made


def test_a_record_comes_back(journal):
    assert journal.finished(3)["x"] == 1


def test_a_job_without_a_record_is_not_finished(journal):
    assert journal.read(4) is None and journal.finished(4) is None


@pytest.mark.parametrize("content", [None, b"", b"hell", b"jello"], ids=str)
def test_a_job_whose_file_is_gone_or_changed_is_not_finished(journal, content):
    path = journal.files / "deep" / "a"
    path.unlink() if content is None else path.write_bytes(content)
    assert journal.finished(3) is None


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == before
