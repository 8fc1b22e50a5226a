from __future__ import annotations

import pytest

from shardforge.cli.main import main
from shardforge.launch import preflight_facts

PROFILE = """\
scheduler: slurm
node: {cpus: 4, gpus: GPUS}
preflight: {free_memory: 0, free_disk: 0, write_bytes: 1000}
"""


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight_facts, "gpus", lambda: ((), "", "nvidia-smi is not there"))
    monkeypatch.chdir(tmp_path)


def profile(tmp_path, gpus: int = 0) -> str:
    (tmp_path / "ours.yaml").write_text(PROFILE.replace("GPUS", str(gpus)))
    return str(tmp_path / "ours.yaml")


def test_a_fit_machine_is_0(tmp_path, capsys):
    assert main(["preflight", "--cluster", profile(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("preflight here: 1 of 1 nodes are good, 1 needed")


def test_gpus_of_the_profile_that_are_not_here_are_3(tmp_path, capsys):
    assert main(["preflight", "--cluster", profile(tmp_path, 8)]) == 3
    assert "is bad: nvidia-smi is not there" in capsys.readouterr().out


def test_the_corpora_of_a_recipe_are_looked_for(tmp_path, capsys):
    words = ["preflight", "first", "--cluster", profile(tmp_path), "--set", "data.sources=[{path: nowhere}]"]
    assert main(words) == 4
    assert f"stop: {tmp_path / 'nowhere'}: the folder does not exist" in capsys.readouterr().out


def test_nothing_is_left_where_the_run_would_be(tmp_path):
    main(["preflight", "first", "--cluster", profile(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["ours.yaml"]


def test_an_unknown_profile_is_a_mistake(capsys):
    assert main(["preflight", "--cluster", "nowhere"]) == 2
    assert "there is no cluster profile 'nowhere'" in capsys.readouterr().err
