from __future__ import annotations

import resource
from types import SimpleNamespace

import psutil
import pytest

from shardforge.families.memory import free


@pytest.fixture
def group(tmp_path, monkeypatch):
    """group("a/b", "5000", 1200, 200): a control group with a limit, bytes in use, and those of them that are files."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))

    def make(name, limit, used, files=0):
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")
        (tmp_path / "group").write_text(f"0::/{name}\n")
        return tmp_path / "groups", tmp_path / "group"

    return make


def test_without_a_limit_it_is_what_the_machine_has(group):
    assert free(*group("job", "max", 1200)) == 10**6


def test_a_control_group_limits_it_and_its_pages_of_files_count_as_free(group):
    assert free(*group("job", 5000, 1200, 200)) == 4000


def test_a_group_around_the_group_limits_it_too(group):
    group("job", 3000, 1000)
    assert free(*group("job/step", "max", 500)) == 2000


def test_a_machine_without_such_groups_has_no_such_limit(group, tmp_path):
    group("job", 5, 1)
    assert free(tmp_path / "none", tmp_path / "nothing") == 10**6


def test_a_limit_of_the_process_counts(group, monkeypatch):
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(vms=700, data=300))
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: 1000}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], -1))
    assert free(*group("job", "max", 0)) == 700


def test_what_is_used_up_is_nothing(group):
    assert free(*group("job", 1000, 1200)) == 0
