"""`shardforge launch` up to the door of Slurm, and beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardforge.cli.main import main
from shardforge.data.synthetic import markov
from tests.tiny import mapping

PROFILE = """scheduler: slurm
queue: {walltime: "00:30:00", lead_s: 60}
node: {cpus: 4, ranks: 2}
storage: {local: []}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus, a recipe of two ranks, a sweep and a profile, on a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    markov(tmp_path / "corpus", vocab=32, documents=40, tokens=30)
    recipe = mapping(data={"sources": [{"path": "corpus"}]}, parallel={"dp_shard": 2})
    (tmp_path / "small.yaml").write_text(json.dumps(recipe))
    arms = {"a": {"schedule": {"lr": 0.001}}, "b": {"schedule": {"lr": 0.02}}}
    del recipe["name"]
    (tmp_path / "rates.yaml").write_text(json.dumps(recipe | {"arms": arms}))
    (tmp_path / "site.yaml").write_text(PROFILE)
    return tmp_path


def script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_the_script_and_writes_nothing(home: Path, capsys):
    before = sorted(home.rglob("*"))
    text = script(capsys, "small.yaml", "--cluster", "site.yaml")
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=tiny-") and "#SBATCH --nodes=1\n" in text
    assert sorted(home.rglob("*")) == before


def test_nodes_style_and_walltime_come_from_the_command_line(capsys):
    words = ("--nodes", "2", "--style", "torchrun", "--walltime", "01:00:00")
    text = script(capsys, "small.yaml", "--cluster", "site.yaml", *words)
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --time=01:00:00\n" in text and "torch.distributed.run" in text


def test_a_field_of_the_profile_is_changed_for_one_submission(capsys):
    text = script(capsys, "small.yaml", "--cluster", "site.yaml", "--profile-set", "queue.partition=debug")
    assert "#SBATCH --partition=debug\n" in text


def test_a_sweep_becomes_an_array_with_a_run_for_each_element(home: Path, capsys):
    text = script(capsys, "rates.yaml", "--cluster", "site.yaml")
    assert "#SBATCH --array=0-1\n" in text and f"1) RUN={home}/runs/rates/b ;;" in text


def test_a_chain_leaves_the_time_limit_to_its_next_job(capsys):
    text = script(capsys, "small.yaml", "--cluster", "site.yaml", "--until", "1M", "--jobs", "3")
    assert "the next job of the chain goes on" in text


def test_a_sweep_cannot_be_a_chain(capsys):
    assert main(["launch", "rates.yaml", "--cluster", "site.yaml", "--until", "1M"]) == 2
    assert "an array of a sweep cannot be a chain" in capsys.readouterr().err


def test_mistakes_of_profile_and_recipe_come_together(home: Path, capsys):
    (home / "site.yaml").write_text(PROFILE + "wall: 3\n")
    assert main(["launch", "small.yaml", "--cluster", "site.yaml", "--set", "train.steps=0"]) == 2
    said = capsys.readouterr().err
    assert "2 problems in the launch" in said and "site.yaml:5:1" in said and "train.steps" in said


def test_mistakes_of_sizes_and_of_the_corpus_come_together(capsys):
    words = ["--nodes", "3", "--set", "data.sources.0.path=elsewhere", "--dry-run"]
    assert main(["launch", "small.yaml", "--cluster", "site.yaml", *words]) == 2
    said = capsys.readouterr().err
    assert "3 nodes x 2 ranks = 6" in said and "elsewhere" in said


def test_without_slurm_nothing_is_submitted_and_nothing_written(home: Path, capsys):
    before = sorted(home.rglob("*"))
    assert main(["launch", "small.yaml", "--cluster", "site.yaml"]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err and sorted(home.rglob("*")) == before


def test_on_several_machines_without_slurm_the_lines_to_type_are_printed(capsys):
    assert main(["launch", "small.yaml", "--cluster", "local", "--nodes", "2", "--set", "seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("torchrun --nproc-per-node=1 --nnodes=2")
    assert "--node-rank=1 -m shardforge train small.yaml --set seed=3" in lines[1]


def test_on_this_machine_the_run_is_trained(home: Path):
    words = ["--set", "parallel.dp_shard=1", "--set", "train.steps=1"]
    assert main(["launch", "small.yaml", "--cluster", "local", *words]) == 0
    assert json.loads((home / "runs" / "tiny" / "stopped.json").read_text())["state"] == "finished"


def test_a_budget_of_tokens_is_the_length_of_the_run(home: Path):
    words = ["--set", "parallel.dp_shard=1", "--until", "128"]
    assert main(["launch", "small.yaml", "--cluster", "local", *words]) == 0
    assert json.loads((home / "runs" / "tiny" / "stopped.json").read_text())["step"] == 1
