from __future__ import annotations

import json
import math
import os
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardforge.cli.main import main
from tests.unit.upcycle import dense


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense.save(tmp_path_factory.mktemp("run") / "run", trained=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.tensor([1.0, math.nan])}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_it_says_whose_it_is_its_step_its_model_and_its_optimizer(run, capsys):
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step-00000007: ShardForge, torch " in out and "  step 7\n" in out and "written by 1 rank" in out
    assert "optimizer: exp_avg, exp_avg_sq, step of the weights" in out
    assert "model: 2 layers, hidden 16, vocab 32" in out and "gqa" in out


def test_what_is_damaged_is_told_and_fails(file, capsys):
    os.truncate(file, file.stat().st_size - 1)
    assert main(["inspect", str(file)]) == 1
    assert "problem: a.safetensors: " in capsys.readouterr().out


def test_tensors_are_listed_on_request(run, capsys):
    assert main(["inspect", str(run), "--tensors"]) == 0
    assert "embed.weight                         [32, 16]  float32  2.00 KiB" in capsys.readouterr().out


def test_tensors_of_an_unknown_model_are_listed_without_being_asked_for(file, capsys):
    assert main(["inspect", str(file)]) == 0
    assert "a       [2, 3]  float32   24 B" in capsys.readouterr().out


def test_numbers_that_are_not_finite_come_first_and_fail(file, capsys):
    assert main(["inspect", str(file), "--numbers"]) == 1
    out = capsys.readouterr().out
    table = out[out.index("\ntensor ") + 1 :].splitlines()
    assert table[1].split() == ["b", "1", "1", "1", "1", "0", "1", "0"]
    assert table[-1] == "2 tensors, norm of all 2.6457513; 1 numbers in 1 tensors are not finite"


def test_a_long_table_is_cut_unless_all_is_asked_for(tmp_path, capsys):
    save_file({f"x{n}": torch.ones(1) for n in range(50)}, tmp_path / "a.safetensors")
    main(["inspect", str(tmp_path / "a.safetensors")])
    assert "and 10 more; --all shows them" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "a.safetensors"), "--all"])
    assert "more;" not in capsys.readouterr().out


def test_equal_checkpoints_are_told_as_equal(file, capsys):
    assert main(["inspect", str(file), "--against", str(file)]) == 0
    assert "2 tensors compared, 0 differ: equal bit for bit" in capsys.readouterr().out


def test_different_checkpoints_fail_with_the_worst_tensor_first(file, tmp_path, capsys):
    other = {"a": torch.ones(2, 3) * 1.5, "b": torch.tensor([3.0, math.nan]), "c": torch.ones(1)}
    save_file(other, tmp_path / "b.safetensors")
    assert main(["inspect", str(file), "--against", str(tmp_path / "b.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "c: only there" in out and out.index("b       2.000e+00") < out.index("a       5.000e-01")


def test_models_that_compute_something_else_are_told_field_by_field(run, tmp_path, capsys):
    other = dense.save(tmp_path / "other", model={"norm": {"kind": "rmsnorm", "eps": 0.5}})
    assert main(["inspect", str(run), "--against", str(other)]) in (0, 1)
    assert "model: norm.eps: 1e-06 here, 0.5 there" in capsys.readouterr().out


def test_json_has_all_of_it(run, file, capsys):
    assert main(["inspect", str(run), "--json", "--numbers", "--against", str(run), "--moments"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["step"], found["named"], found["problems"]) == ("shardforge", 7, "shardforge", [])
    assert found["tensors"]["embed.weight"] == {"shape": [32, 16], "dtype": "float32", "numbers": 512, "bytes": 2048}
    assert found["numbers"]["embed.weight exp_avg"]["count"] == 512 and found["against"]["same"]


def test_json_has_no_number_that_json_does_not_know(file, tmp_path, capsys):
    save_file({"a": torch.ones(2, 3), "b": torch.tensor([1.0, 1.0])}, tmp_path / "b.safetensors")
    assert main(["inspect", str(file), "--json", "--against", str(tmp_path / "b.safetensors")]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found["against"]["tensors"]["b"]["largest"] == "infinite"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--moments",), "--moments changes nothing here"),
        (("--against-config", "x"), "--against-config changes nothing here"),
        (("--processes", "0"), "0 processes cannot work"),
        (("--config", "x"), "says itself what model it is"),
    ],
)
def test_options_that_cannot_be_meant_are_mistakes(run, capsys, words, told):
    assert main(["inspect", str(run), *words]) == 2
    assert told in capsys.readouterr().err


def test_a_path_without_a_checkpoint_is_a_mistake(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no weights are recognised here" in capsys.readouterr().err


def test_what_would_steer_a_terminal_is_shown_as_text(tmp_path, capsys):
    gguf = pytest.importorskip("gguf", reason="the package gguf writes the file")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_name("red \x1b[31m")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    main(["inspect", str(tmp_path / "x.gguf")])
    out = capsys.readouterr().out
    assert r"name: red \x1b[31m" in out and "\x1b" not in out


def test_the_script_says_what_the_command_says(file, capsys, monkeypatch):
    assert main(["inspect", str(file), "--numbers"]) == 1  # a number is not finite
    said = capsys.readouterr().out
    script = Path(__file__).parents[3] / "tools" / "inspect_checkpoint.py"
    monkeypatch.setattr("sys.argv", [str(script), str(file), "--numbers"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1 and capsys.readouterr().out == said
