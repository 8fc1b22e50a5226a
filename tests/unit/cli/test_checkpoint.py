from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardforge.checkpoint.store import Store
from shardforge.cli.main import main
from shardforge.recipe.schema import CheckpointConfig


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with steps 5 and 10, and a torn one."""
    describe = {"model": {"x": {"shape": [3, 4], "dtype": "float32"}}}
    store = Store(tmp_path / "checkpoints", CheckpointConfig(), describe=describe)
    for step in (5, 10):
        store.save(step, {"model.x": torch.ones(3, 4), "optim.x.step": torch.tensor(1.0)}, {}, wait=True)
    store.close()
    (tmp_path / "checkpoints" / "step-00000015.tmp-0").mkdir()
    return tmp_path


def test_list_names_steps_and_torn_saves(run_dir, capsys):
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["5", "10", "torn"]
    assert "step-00000015.tmp-0" in lines[-1]


def test_audit_of_a_sound_run_is_quiet_and_succeeds(run_dir, capsys):
    assert main(["checkpoint", "audit", str(run_dir)]) == 0
    assert [": sound;" in line for line in capsys.readouterr().out.splitlines()] == [True, True]


def test_audit_names_the_problem_and_fails(run_dir, capsys):
    folder = run_dir / "checkpoints" / "step-00000005"
    (folder / "rank-00000.safetensors").unlink()
    assert main(["checkpoint", "audit", str(folder)]) == 1
    assert "rank-00000.safetensors is missing" in capsys.readouterr().out


def test_show_prints_every_tensor_of_the_newest_step(run_dir, capsys):
    assert main(["checkpoint", "show", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 10 in ")
    assert "model.x       [3, 4]            float32              48 B  1 pieces" in out


@pytest.mark.parametrize("action", ["list", "audit", "show"])
def test_a_path_that_does_not_exist_is_a_mistake(tmp_path, capsys, action):
    assert main(["checkpoint", action, str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_run_without_checkpoints_cannot_be_shown(tmp_path, capsys):
    assert main(["checkpoint", "show", str(tmp_path)]) == 2
    assert "no checkpoint was committed here" in capsys.readouterr().err
