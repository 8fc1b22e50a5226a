from __future__ import annotations

from shardforge.checkpoint.filling import line, shown, written


def test_a_line_has_rate_and_time_left():
    assert line(3 << 30, 5 << 30, 1 << 30, 4.0) == "3.00 GiB of 5.00 GiB, 512 MiB/s, 4 s left"


def test_nothing_written_yet_has_no_time_left():
    assert "left" not in line(0, 100, 0, 1.0)


def test_files_count_in_folders_too(tmp_path):
    (tmp_path / "rank-00000.safetensors").write_bytes(b"12345")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "fp32.pt").write_bytes(b"123")
    assert written(tmp_path) == 8


def test_the_watcher_ends_with_the_work(tmp_path):
    import threading

    with shown(tmp_path, 10, 0, "filling"):
        assert any(thread.name == "filling" for thread in threading.enumerate())
    assert not any(thread.name == "filling" for thread in threading.enumerate())
