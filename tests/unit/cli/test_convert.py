from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from shardforge.cli.convert import layout, size
from shardforge.cli.main import main
from shardforge.core.errors import ForgeError
from tests.unit.upcycle import dense


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dense.save(tmp_path_factory.mktemp("cli") / "run", trained=True)


def convert(*words):
    return main(["convert", *map(str, words)])


def test_it_says_what_was_done_left_behind_and_proved(source, tmp_path, capsys):
    assert convert(source, tmp_path / "hf", "--to", "huggingface", "--proof", "own", "--processes", 1) == 0
    said = capsys.readouterr().out
    assert "shardforge -> huggingface: 21 tensors" in said and "renamed" in said
    assert "left behind: what the optimizer kept" in said and "proved with own" in said
    assert convert(source, tmp_path / "hf", "--to", "huggingface", "--proof", "own", "--processes", 1) == 0
    assert "already made, nothing to do" in capsys.readouterr().out


def test_flags_become_the_options_of_the_certificate(source, tmp_path):
    words = ["--dtype", "bf16", "--moments", "drop", "--layout", "tp2-pp2", "--shard-size", "5KB", "--proof", "none"]
    assert convert(source, tmp_path / "ours", "--to", "shardforge", *words) == 0
    told = json.loads((tmp_path / "ours" / "conversion.json").read_text())["identity"]["options"]
    assert told | {"target": ""} == {
        "to": "shardforge",
        "layout": {"tp": 2, "pp": 2},
        "dtype": "bf16",
        "moments": "drop",
        "shard_bytes": 5000,
        "tokenizer": None,
        "config": None,
        "target": "",
    }


def test_a_check_finds_a_changed_file(source, tmp_path, capsys):
    convert(source, tmp_path / "hf", "--to", "huggingface", "--proof", "none")
    assert convert("--check", tmp_path / "hf") == 0
    assert "as certified" in capsys.readouterr().out
    (tmp_path / "hf" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text() + " ")
    assert convert("--check", tmp_path / "hf") == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["SRC", "DST"],
        ["SRC", "--to", "shardforge"],
        ["SRC", "--check", "DIR"],
        ["--check", "DIR", "--layout", "tp2"],
        ["--check", "DIR", "--dtype", "source"],
        ["--check", "DIR", "--processes", "2"],
        ["--check", "DIR", "--config", "config.json"],
        ["A", "B", "--to", "C", "--processes", "0"],
    ],
    ids=" ".join,
)
def test_what_is_not_said_is_asked_for(words, capsys):
    assert convert(*words) == 2
    assert "fix:" in capsys.readouterr().err


def test_a_check_proves_every_layer_with_bisect(source, tmp_path, capsys):
    convert(source, tmp_path / "hf", "--to", "huggingface", "--proof", "none")
    capsys.readouterr()
    assert convert("--check", tmp_path / "hf", "--proof", "own", "--bisect") == 0
    said = capsys.readouterr().out
    assert "proved with own" in said and "blocks.1 " in said


def test_a_result_without_a_proof_is_proved_by_the_same_command_with_one(source, tmp_path, capsys):
    convert(source, tmp_path / "hf", "--to", "huggingface", "--proof", "none")
    assert convert(source, tmp_path / "hf", "--to", "huggingface", "--proof", "own") == 0
    said = capsys.readouterr().out
    assert "already made, proved now" in said and "proved with own" in said


@pytest.mark.parametrize("text, expected", [("4GiB", 4 << 30), ("1.5mb", 1_500_000), ("100", 100), ("2 KiB", 2048)])
def test_a_size_is_read(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "4 gallons", "-1GB", "0", "GiB"])
def test_a_word_that_is_no_size_is_refused(text):
    with pytest.raises(ForgeError, match="is not a size"):
        size(text)


def test_a_layout_is_read():
    assert layout("tp2-pp4-ep8-rep2") == {"tp": 2, "pp": 4, "ep": 8, "dp_replicate": 2} and layout(None) is None


@pytest.mark.parametrize("text", ["2tp", "tp0", "tp2-tp4", "xx2", ""])
def test_a_word_that_is_no_layout_is_refused(text):
    with pytest.raises(ForgeError, match="cannot read the layout"):
        layout(text)


def test_an_interrupt_is_told_and_the_same_command_goes_on(source, tmp_path, capsys, monkeypatch):
    from shardforge.convert import pieces

    def make(self, item):
        raise KeyboardInterrupt

    words = [source, tmp_path / "hf", "--to", "huggingface", "--proof", "none", "--processes", 1]
    with monkeypatch.context() as patch:
        patch.setattr(pieces.Pieces, "make", make)
        assert convert(*words) == 130
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    assert convert(*words) == 0


def test_the_script_is_the_command(source, tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"))
    assert script["main"] is main
