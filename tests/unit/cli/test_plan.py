from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from shardforge.cli.main import FAILED, main
from tests.tiny import mapping


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the recipe x: four layers on pp2-dp2, four micro-batches."""
    monkeypatch.chdir(tmp_path)
    recipe = mapping(
        model={"stack": ["one x 4"]},
        parallel={"pp": 2, "dp_shard": 2},
        train={"steps": 1, "sequences": 8, "seq_len": 16, "micro_batch": 1},
        engine={"kind": "native", "zero": 1},
    )
    Path("x.yaml").write_text(yaml.safe_dump(recipe))


def test_a_schedule_is_pictured_with_what_each_rank_waits_and_holds(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "x.yaml", "--schedule", "1f1b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1f1b: 2 ranks, 2 stages, 4 micro-batches, bubble 2")
    assert lines[2].startswith("rank 0  F0") and "B3" in lines[3]
    assert [line.split()[0] for line in lines[-3:]] == ["rank", "0", "1"]
    assert "KiB" in lines[-1]


def test_without_a_name_all_schedules_are_compared_and_drawn(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "x.yaml", "--schedule", "--png", "p.png", "--micro-batches", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
    assert "dualpipev over pp=2 cannot run 3 micro-batches: it needs at least 4" in lines
    assert lines[-1] == "picture  p.png" and Path("p.png").read_bytes().startswith(b"\x89PNG")


def test_measured_costs_come_with_the_stages_that_balance_them(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "x.yaml", "--schedule", "gpipe", "--costs", "measured"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("timing 3 parts") and any(line.startswith('stages: "') for line in lines)


def test_ranks_are_placed_on_nodes(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "x.yaml", "--ranks", "--per-node", "2"]) == 0
    out = capsys.readouterr().out
    assert "pp             2       2  0 2          crosses: 2 nodes a group" in out
    assert "|  2 pp1 dp0 |  3 pp1 dp1 |" in out


def test_a_dry_run_prints_bytes_of_each_stage(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "x.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isdigit()] == ["0", "2"]


def test_weights_flop_and_cache_are_printed(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "x.yaml", "--params"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = {line[0]: line[1] for line in lines if len(line) > 1}
    kept = ("total", "active_nonembedding", "kv_bytes_per_token")
    assert [numbers[name] for name in kept] == ["9,872", "8,848", "256"]
    assert lines[0] == ["tiny,", "sequences", "of", "16", "tokens"]


def test_the_same_numbers_come_as_json_of_a_shipped_model_by_name(capsys: pytest.CaptureFixture[str]):
    assert (
        main(["plan", "llama3-8b", "--params", "--json", "--seq-len", "8192", "--set", "model.stack=[dense x 2]"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == found["active"] == 2 * 218_112_000 + 2 * 525_336_576 + 4096
    assert found["active_nonembedding"] == 2 * 218_112_000 + 4096
    assert (found["kv_bytes_per_token"], found["kv_type"], found["seq_len"]) == (8192, "bf16", 8192)
    linear, pairs = 2 * 218_103_808 + 525_336_576, 8193 / 2 * 4 * 2 * 4096
    assert found["flops_per_token"] == 3 * (2 * linear + pairs)
    assert found["blocks"][0]["name"] == "dense" and found["blocks"][0]["layers"] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to plan"),
        (["--ranks", "--dry-run"], "one thing at a time"),
        (["--params", "--dry-run"], "one thing at a time"),
        (["--params", "--seq-len", "0"], "'0' is no whole number from 1 on"),
        (["--params", "--set", "model.hidden=none"], "model.hidden: expected int, got str 'none'"),
        (["--params", "--set", "model.stack=[(one two) x 2]"], "model.stack: no block is called 'two'"),
        (["--ranks", "--json"], "--json changes nothing here"),
        (["--ranks", "--seq-len", "8"], "--seq-len changes nothing here"),
        (["--schedule", "1f2b"], "did you mean '1f1b'?"),
        (["--schedule", "--pp", "0"], "'0' is no whole number from 1 on"),
        (["--schedule", "1f1b", "--micro-batches", "x"], "'x' is no whole number from 1 on"),
        (["--schedule", "1f1b", "--latency", "-1"], "'-1' is no time from 0 on"),
        (["--schedule", "--pp", "9"], "zbv over pp=9 makes 18 stages of 4 layers"),
        (["--schedule", "interleaved", "--pp", "4"], "makes 8 stages of 4 layers"),
        (["--schedule", "dualpipev", "--micro-batches", "3"], "dualpipev over pp=2 cannot run 3 micro-batches"),
        (["--schedule", "1f1b", "--costs", "1,2"], "cannot read the costs '1,2'"),
        (["--schedule", "1f1b", "--costs", "1,0,1"], "cannot read the costs '1,0,1'"),
        (["--ranks", "--per-node", "0"], "a node has at least one rank"),
        (["--dry-run", "--rank", "4"], "has no rank 4"),
        (["--dry-run", "--set", "parallel.tp=3"], "cannot be split 3 ways over tp"),
    ],
)
def test_mistakes_are_told_with_exit_code_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "x.yaml", *words]) == FAILED
    assert told in capsys.readouterr().err
