from __future__ import annotations

import pytest

from shardforge.cli.main import main
from shardforge.upcycle.options import read_options
from tests.unit.upcycle import dense


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dense.save(tmp_path_factory.mktemp("cli") / "run", model={"vocab": 300})


def upcycle(*words):
    return main(["upcycle", *map(str, words), "--processes", "1"])


def test_it_makes_a_folder_that_audits_sound_and_says_what_it_did(source, tmp_path, capsys):
    assert upcycle(source, tmp_path / "out", "--experts", 4, "--ratio", 0.25) == 0
    said = capsys.readouterr().out
    assert "25.0%" in said and "2 layers of experts" in said and "does not compute what the source does" in said
    assert main(["checkpoint", "audit", str(tmp_path / "out")]) == 0
    assert "sound" in capsys.readouterr().out


def test_flags_become_the_options_that_the_output_keeps(source, tmp_path):
    words = [
        "--method",
        "noise",
        "--noise-std",
        "0.1",
        "--no-share-indices",
        "--k",
        1,
        "--layers",
        "1",
        "--set",
        "seed=7",
    ]
    assert upcycle(source, tmp_path / "out", *words) == 0
    kept = read_options(tmp_path / "out" / "upcycle.yaml").options
    assert (kept.method.kind, kept.method.std, kept.method.share_indices) == ("noise", 0.1, False)
    assert (kept.k, kept.layers, kept.seed) == (1, "1", 7)


def test_the_kept_options_repeat_the_run(source, tmp_path):
    assert upcycle(source, tmp_path / "a", "--seed", 9, "--experts", 3) == 0
    assert upcycle(source, tmp_path / "b", "--config", tmp_path / "a" / "upcycle.yaml") == 0
    one, other = (dense.contents(tmp_path / name / "checkpoints") for name in "ab")
    assert one == other


def test_a_text_compares_both_models(source, tmp_path, capsys):
    from shardforge.data.tokenizer import train

    tokenizer = tmp_path / "tokenizer.json"
    train(["some text to learn from"], 280).save(str(tokenizer))
    text = tmp_path / "text.txt"
    text.write_text("naive copies compute what the dense model does")
    words = ["--method", "naive", "--text", text, "--tokenizer", tokenizer]
    assert upcycle(source, tmp_path / "out", *words) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss of")]
    before, after = line.split("source ")[1].split()[0].rstrip(","), line.split("result ")[1].split()[0]
    assert abs(float(before) - float(after)) < 1e-5
    assert before in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "words, told",
    [
        (["--ratio", "1.5"], "upcycle.method.ratio"),
        (["--method", "naive", "--ratio", "0.5"], "leave --ratio out, or choose --method drop or noise"),
        (["--k", "9"], "k=9 of experts=8"),
        (["--processes", "0"], "--processes"),
        (["--text", "nowhere.txt"], "--text nowhere.txt"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(source, tmp_path, capsys, words, told):
    assert main(["upcycle", str(source), str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
